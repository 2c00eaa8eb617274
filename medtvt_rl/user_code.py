"""What the configuration names by a dotted path, called so that its exceptions say nothing of a patient.

Owns: the task's prompts, item source and evaluator behind `privacy.user_code`. Does not own: finding them (dotted.py),
or rewards, whose exceptions concern one completion (rewards/scorer.py). Importable without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medtvt_rl.dotted import resolve
from medtvt_rl.privacy import user_code
from medtvt_rl.types import Prompt

if TYPE_CHECKING:
    from medtvt_rl.config import Config


class TaskItems:
    """The item source of a task."""

    def __init__(self, source: Any, name: str) -> None:
        self._source, self._name = source, name

    def get(self, item_id: str) -> dict[str, Any]:
        """One item. Raises UserCodeError for what the source raises."""
        with user_code(self._name):
            item: dict[str, Any] = self._source.get(item_id)
            return item

    def fingerprint(self) -> str | None:
        """The source's own, which changes with the content of its items; None where it has none."""
        own = getattr(self._source, "fingerprint", None)
        if own is None:
            return None
        with user_code(self._name):
            return str(own())


class TaskEvaluator:
    """The evaluator of a task."""

    def __init__(self, evaluator: Any, name: str) -> None:
        self._evaluator, self._name = evaluator, name

    def evaluate(self, answers: Mapping[str, Any]) -> Any:
        """The result of one policy. Raises UserCodeError for what the evaluator raises."""
        with user_code(self._name):
            return self._evaluator.evaluate(answers)

    def paired_gain(self, before: Any, after: Any, **options: Any) -> Any:
        """The change between two results. Raises UserCodeError for what the evaluator raises."""
        with user_code(self._name):
            return self._evaluator.paired_gain(before, after, **options)


class TextComparingEvaluator(TaskEvaluator):
    """The evaluator of a task that also compares answers with reference answers, as texts."""

    def compare_texts(self, answers: Mapping[str, Any], on_progress: Callable[[int], None]) -> Any:
        """The comparison of one policy. Raises UserCodeError for what the evaluator raises."""
        with user_code(self._name):
            return self._evaluator.compare_texts(answers, on_progress)


def task_items(config: Config) -> TaskItems | None:
    """The item source that `task.items` names; None for plain text."""
    path = config.task.items
    if path is None:
        return None
    make, name = resolve(path, "task.items"), f"task.items {path}"
    with user_code(name):
        return TaskItems(make(config), name)


def task_prompts(config: Config, tokenizer: Any, split: str) -> Sequence[Prompt]:
    """The prompts of a split that `task.prompts` makes."""
    make = resolve(config.task.prompts, "task.prompts")
    with user_code(f"task.prompts {config.task.prompts}"):
        prompts: Sequence[Prompt] = make(config, tokenizer, split)
        return prompts


def task_evaluator(config: Config, split: str) -> TaskEvaluator | None:
    """The evaluator that `task.evaluate` names; None where it names none."""
    path = config.task.evaluate
    if path is None:
        return None
    make, name = resolve(path, "task.evaluate"), f"task.evaluate {path}"
    with user_code(name):
        evaluator = make(config, split)
    kind = TextComparingEvaluator if hasattr(evaluator, "compare_texts") else TaskEvaluator
    return kind(evaluator, name)
