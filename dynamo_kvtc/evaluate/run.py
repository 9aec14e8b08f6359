"""A whole evaluation: everything that can be wrong is found before the first token is prefilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamo_kvtc.codec.policy import ExactPolicy
from dynamo_kvtc.errors import ConfigError, TooFewTokensError
from dynamo_kvtc.evaluate import tasks
from dynamo_kvtc.evaluate.plot import check_plot
from dynamo_kvtc.evaluate.quality import check_lengths, measure
from dynamo_kvtc.evaluate.report import Row, row, versions
from dynamo_kvtc.evaluate.selection import OpenArtifact, Selected, open_artifacts, parse_codecs, select
from dynamo_kvtc.hf.model import Model, load_model
from dynamo_kvtc.hf.text import text_source, token_sequences

Progress = Callable[[str, float], None]
"""Called with what is going on and the share of the work done, 0 to 1."""


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate; see `kvtc eval --help`. device and dtypes as in ``hf.model.load_model``.

    codecs, tasks: comma-separated names. sequences: per text. context, continuation, window: tokens.
    task_examples: per task; None takes all of lambada's and passkey's default.
    json, plot: files that will be written.
    """

    model: str
    data: tuple[str, ...]
    codecs: str
    artifacts: tuple[str, ...] = ()
    sequences: int = 16
    context: int = 2048
    continuation: int = 512
    sinks: int = 4
    window: int = 128
    tasks: str = ""
    task_examples: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    compute_dtype: str | None = None
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("no text to evaluate on; give --data FILE")
        if len(set(self.data)) != len(self.data):
            raise ConfigError(f"--data names a text twice: {', '.join(self.data)}")
        if self.sequences < 1:
            raise ConfigError(f"--sequences is {self.sequences}; it must be at least 1")
        if self.task_examples is not None and self.task_examples < 1:
            raise ConfigError(f"--task-examples is {self.task_examples}; it must be at least 1")
        check_lengths(self.context, self.continuation, self.policy)

    @property
    def policy(self) -> ExactPolicy:
        return ExactPolicy(sinks=self.sinks, window=self.window)


@dataclass(frozen=True)
class _Plan:
    """What was checked before the model is there."""

    artifacts: list[OpenArtifact]
    selected: list[Selected]
    tasks: list[tasks.TaskName]
    passages: list[tuple[str, str]] = field(default_factory=list)


def run(config: EvalConfig, progress: Progress) -> list[Row]:
    """Rows of ``report.row``, by text and then by codec.

    Raises KvtcError for anything that cannot be done, before the model is loaded where that can be known, and before
    it is run otherwise.
    """
    plan = _plan(config)
    progress(f"loading {config.model}", 0.0)
    model = load_model(config.model, config.device, config.dtype, config.compute_dtype)
    for opened in plan.artifacts:
        opened.artifact.check_model(model.identity, model.shape, model.rope)
    texts = {source: _sequences(config, source, model) for source in config.data}
    examples = {task.kind: _examples(config, task, plan, model) for task in plan.tasks}
    codecs = [chosen.build(config.policy, model.device) for chosen in plan.selected]

    steps = len(codecs) * (sum(map(len, texts.values())) + sum(map(len, examples.values())))
    done = 0

    def stepper(what: str) -> Callable[[str], None]:
        def on_step(codec: str) -> None:
            nonlocal done
            done += 1
            progress(f"{what}, {codec}", done / steps)

        progress(what, done / steps)
        return on_step

    qualities = {
        source: measure(model, ids, config.context, codecs, config.policy, stepper(Path(source).name))
        for source, ids in texts.items()
    }
    results = [
        tasks.run_task(model, kind, found, codecs, config.sinks, stepper(kind)) for kind, found in examples.items()
    ]
    shared = settings(config, model)
    return [
        row(source, plan.selected[i], quality, [result[i] for result in results], shared)
        for source, by_codec in qualities.items()
        for i, quality in enumerate(by_codec)
    ]


def settings(config: EvalConfig, model: Model) -> Row:
    """What all rows of one run share."""
    return {
        "context": config.context,
        "continuation": config.continuation,
        "sinks": config.sinks,
        "window": config.window,
        "model": model.identity.model_id,
        "revision": model.identity.revision,
        "weights_digest": model.identity.weights_digest,
        "dtype": model.shape.dtype,
        "device": model.device.type,
        "versions": versions(),
    }


def _plan(config: EvalConfig) -> _Plan:
    names = parse_codecs(config.codecs)
    wanted = tasks.parse_tasks(config.tasks)
    for source in config.data:
        text_source(source)
    for option, path in (("--json", config.json), ("--plot", config.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{option} {path} cannot be written: its folder does not exist, or it is one")
    if config.plot is not None:
        check_plot(config.plot)
    artifacts = open_artifacts(config.artifacts)
    selected = select(names, artifacts)
    passages: list[tuple[str, str]] = []
    for task in wanted:
        if task.path is not None:
            passages = tasks.read_passages(task.path, config.task_examples)
    return _Plan(artifacts, selected, wanted, passages)


def _sequences(config: EvalConfig, source: str, model: Model) -> list[Tensor]:
    length = config.context + config.continuation
    if length > model.max_positions:
        raise ConfigError(
            f"--context {config.context} and --continuation {config.continuation} make {length} tokens; "
            f"{model.identity.model_id} has {model.max_positions} positions"
        )
    found = token_sequences([source], model.tokenizer, length, config.sequences).sequences
    if len(found) < config.sequences:
        raise TooFewTokensError(
            f"text {source!r} gives {len(found)} sequences of {length} tokens; {config.sequences} were asked: "
            f"--sequences {len(found)}, shorter ones, or more text"
        )
    return found


def _examples(config: EvalConfig, task: tasks.TaskName, plan: _Plan, model: Model) -> Sequence[Any]:
    if task.kind == tasks.PASSKEY:
        return tasks.passkey_examples(model.tokenizer, model.max_positions, config.task_examples, config.sinks)
    return tasks.lambada_examples(plan.passages, model.tokenizer, model.max_positions, config.sinks)
