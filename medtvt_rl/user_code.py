"""What the configuration names by a dotted path, called so that its exceptions say nothing of a patient.

Owns: the task's prompts, examples, item source and evaluator behind `privacy.user_code`. Does not own: finding them
(dotted.py), or rewards, whose exceptions concern one completion (rewards/scorer.py). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from medtvt_rl.dotted import resolve
from medtvt_rl.privacy import user_code
from medtvt_rl.types import Prompt

if TYPE_CHECKING:
    from medtvt_rl.config import Config


class Guarded:
    """An object of the user's with every method that it has, each behind `user_code`.

    Args:
        name: in errors, e.g. "task.items mine:Items".
    """

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") or attribute in ("inner", "name"):
            raise AttributeError(attribute)
        found = getattr(self.inner, attribute)
        return guarded(found, self.name) if callable(found) else found


def guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, raising UserCodeError for what it raises."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with user_code(name):
            return function(*args, **options)

    return call


def task_items(config: Config) -> Any:
    """The item source that `task.items` names; None for plain text."""
    return _made(config.task.items, "task.items", config)


def task_evaluator(config: Config, split: str) -> Any:
    """The evaluator that `task.evaluate` names; None where it names none."""
    return _made(config.task.evaluate, "task.evaluate", config, split)


def task_prompts(config: Config, tokenizer: Any, split: str) -> Sequence[Prompt]:
    """The prompts of a split that `task.prompts` makes."""
    make = guarded(resolve(config.task.prompts, "task.prompts"), f"task.prompts {config.task.prompts}")
    prompts: Sequence[Prompt] = make(config, tokenizer, split)
    return prompts


def _made(path: str | None, key: str, *args: Any) -> Guarded | None:
    if path is None:
        return None
    name = f"{key} {path}"
    return Guarded(guarded(resolve(path, key), name)(*args), name)
