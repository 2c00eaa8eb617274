"""Laboratory values: rows, means, percentiles, one patient's file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labs import (
    LAB_IDS,
    LAB_ITEMS,
    PERCENTILE_SUFFIX,
    PercentileTable,
    labs_from_row,
    read_labs_means,
    read_patient_labs,
)

CREATININE = LAB_IDS.index("50912")


def row(**changes: str) -> dict[str, str]:
    cells = {name: "" for item in LAB_IDS for name in (item, item + PERCENTILE_SUFFIX)}
    cells.update({"50912": "1.5", "50912_percentile": "0.8"})
    cells.update({name.removeprefix("c"): text for name, text in changes.items()})
    return cells


def test_items_are_fifty_in_the_order_of_their_ids() -> None:
    assert len(LAB_IDS) == 50 and list(LAB_IDS) == sorted(LAB_IDS) and LAB_ITEMS["50912"] == "Creatinine"


def test_a_row_gives_values_and_percentiles() -> None:
    labs = labs_from_row(row())
    assert labs.percentiles is not None
    assert labs.values[CREATININE] == 1.5 and labs.percentiles[CREATININE] == np.float32(0.8)
    assert np.isnan(labs.values).sum() == 49


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c50912": "high"}, "column 50912: 'high' is not a number"),
        ({"c50912": "1,5"}, "column 50912: '1,5' is not a number"),
        ({"c50912": "inf"}, "column 50912: 'inf' is not finite"),
        ({"c50912_percentile": "80"}, "column 50912_percentile: 80 is outside 0..1"),
        ({"c50912_percentile": "-0.1"}, "column 50912_percentile: -0.1 is outside"),
        ({"c50912_percentile": ""}, "column 50912_percentile: empty, though 50912 is filled"),
        ({"c50912": ""}, "column 50912: empty, though 50912_percentile is filled"),
    ],
)
def test_a_bad_cell_names_its_column(changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        labs_from_row(row(**changes))


def test_percentiles_are_the_share_at_or_below() -> None:
    values = np.full((4, 50), np.nan)
    values[:, 0] = [1, 2, 2, 4]
    table = PercentileTable.fit(values)
    queries = np.full((5, 50), np.nan)
    queries[:, 0] = [0, 1, 2, 3, 9]
    np.testing.assert_allclose(table.percentiles(queries)[:, 0], [0, 0.25, 0.75, 0.75, 1])
    np.testing.assert_allclose(table.mean_percentiles()[:2], [(0.25 + 0.75 + 0.75 + 1) / 4, 0.5])
    unmeasured = np.full(50, np.nan)
    unmeasured[1] = 3.0
    assert np.isnan(table.percentiles(unmeasured)).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_percentiles_rise_with_the_value(sample: list[float], first: float, second: float) -> None:
    values = np.full((len(sample), 50), np.nan)
    values[:, 3] = sample
    query = np.full((2, 50), np.nan)
    query[:, 3] = sorted((first, second))
    low, high = PercentileTable.fit(values).percentiles(query)[:, 3]
    assert 0 <= low <= high <= 1


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random((30, 50)) < 0.3, np.nan, rng.normal(size=(30, 50)))
    table = PercentileTable.fit(values)
    table.save(tmp_path / "table.json")
    np.testing.assert_array_equal(
        PercentileTable.load(tmp_path / "table.json").percentiles(values), table.percentiles(values)
    )
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(DataError, match="not a percentile table"):
        PercentileTable.load(tmp_path / "table.json")


def test_means_take_both_spellings_and_check_each_item(tmp_path: Path) -> None:
    path = tmp_path / "means.json"
    path.write_text(json.dumps({item + PERCENTILE_SUFFIX * (i % 2): 0.5 for i, item in enumerate(LAB_IDS)}))
    assert read_labs_means(path).tolist() == [0.5] * 50
    path.write_text(json.dumps({item: "x" if item == "50912" else 0.5 for item in LAB_IDS}))
    with pytest.raises(DataError, match=r"means\.json: item 50912 \(Creatinine\) is 'x', expected a number in 0..1"):
        read_labs_means(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid json"):
        read_labs_means(path)
    with pytest.raises(DataError, match="no such file"):
        read_labs_means(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"50912": 1.5, "glucose": "140", "Sodium": null}'),
        ("p.csv", "item,value\n50912,1.5\nGlucose,140\n"),
        ("p.csv", '50912,1.5\nGLUCOSE,140\n\n"Bilirubin, Total",\n'),
    ],
)
def test_a_patients_file_by_id_or_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    values = read_patient_labs(tmp_path / name)
    assert values[CREATININE] == 1.5 and values[LAB_IDS.index("50931")] == 140 and np.isnan(values).sum() == 48


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"Troponin": 1}', "'Troponin' is not one of the 50 items"),
        ("p.json", '{"50912": "high"}', r"p\.json: column 50912: 'high' is not a number"),
        ("p.json", '{"50912": 1, "Creatinine": 2}', r"50912 \(Creatinine\) is given twice"),
        ("p.json", "[1]", "expected an object"),
        ("p.csv", "50912,1,2\n", "entry 1 has 3 cells"),
    ],
)
def test_a_patients_bad_file_is_one_clear_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_patient_labs(tmp_path / name)


def test_a_smoothed_table_gives_nearly_the_same_percentiles_and_holds_no_extreme_value() -> None:
    values = np.random.default_rng(0).lognormal(size=(3000, 50))
    table = PercentileTable.fit(values)
    smoothed = table.smoothed()
    query = np.random.default_rng(1).lognormal(size=(200, 50))
    assert np.abs(smoothed.percentiles(query) - table.percentiles(query)).max() <= 0.01
    assert all(
        len(sample) == 200 and sample.max() < whole.max() for sample, whole in zip(smoothed.samples, table.samples)
    )
