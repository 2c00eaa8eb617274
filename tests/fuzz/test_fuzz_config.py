"""Configurations: YAML bytes and overrides that load, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

from hostile import ODD_TEXTS, SLOW_CASES, any_spoiled, assert_clear
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from medtvt_rl.config import Config, load_config, to_yaml
from medtvt_rl.config_checks import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def leaves(tree: object, key: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    if not isinstance(tree, dict):
        return [key]
    return [leaf for name, value in tree.items() for leaf in leaves(value, f"{key}.{name}" if key else str(name))]


KEYS = leaves(OmegaConf.to_container(OmegaConf.structured(Config)))
VALUES = ODD_TEXTS | st.sampled_from(
    ["[]", "{}", "[1,2]", "{a: 1}", "null", "0", "-5", "1.5", "${run.seed}", "${oc.env:HOME}"]
)


def check(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        assert_clear(error)
        return
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(config), encoding="utf-8", errors="surrogatepass")
    assert to_yaml(load_config(again)) == to_yaml(config)


@SLOW_CASES
@given(content=any_spoiled(QUICKSTART.read_bytes(), " "))
@example(content=b"a: &a [*a, *a]\n")
@example(content=b"run: !!python/object/apply:os.system ['true']\n")
@example(content=b"run: {name: " + b"[" * 5000)
@example(content=b"- 1\n- 2\n")
@example(content=b"7\n")
@example(content=b"\xff\xfe\x00")
def test_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    check(path, [])


@SLOW_CASES
@given(overrides=st.lists(st.tuples(st.sampled_from(KEYS) | ODD_TEXTS, VALUES).map("=".join), min_size=1, max_size=2))
def test_overrides(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(QUICKSTART.read_bytes())
    check(path, overrides)
