"""What Ray takes for the label selectors of a role.

Owns: their check. Does not own: how they are written (medtvt_rl/roles.py), or whether a node meets them
(cluster_file.py).
"""

from __future__ import annotations

from medtvt_rl.config_checks import ConfigError
from medtvt_rl.roles import PlacementConfig, declared, label_selector


def check_labels(placement: PlacementConfig) -> None:
    """Raises ConfigError for a label selector that Ray would refuse when the role is placed, or that no node meets."""
    from ray._private.label_utils import validate_label_selector

    for key, wanted in declared(placement):
        for label, condition in (wanted.labels or {}).items():
            selector = label_selector(condition)
            # Ray's check lets an empty value and a list without its "in" through.
            passes = selector and not selector.removeprefix("!").startswith("(")
            if not passes or validate_label_selector({label: selector}):
                raise ConfigError(
                    f"{key}.labels is {{{label!r}: {condition!r}}}: Ray takes no such label selector; expected a "
                    'label and "x", "!x", "in(x, y)" or "!in(x, y)", each of letters, digits, ".", "_" and "-"'
                )
