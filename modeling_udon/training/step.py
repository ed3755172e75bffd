"""One training step: batch to gradients to weights, with the losses by name."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.centring import CentredStep
from modeling_udon.training.inputs import CachedInputs
from modeling_udon.training.optimization import average_gradients, learning_rates, set_learning_rates, with_gradients
from modeling_udon.training.parts import Embeddings, RelationalBank
from modeling_udon.training.run import Run
from modeling_udon.training.sharding import clip_gradients
from modeling_udon.training.skipped import Judgement, Verdict


@dataclass(frozen=True)
class StepResult:
    """Losses and judgement of one step, still on the device.

    Attributes:
        step: Number of the step, from 0.
        domain: Domain of the batch.
        loss: Total loss of this process's share of the batch, a scalar.
        losses: Its terms by name, scalars.
        verdict: The value of a `Verdict`, the same on every process.
        gradient_norm: Norm of the gradient, the same on every process.
    """

    step: int
    domain: str
    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    verdict: torch.Tensor
    gradient_norm: torch.Tensor


@dataclass(frozen=True)
class StepLosses:
    """A `StepResult` on the host, its losses averaged over processes."""

    step: int
    domain: str
    loss: float
    losses: dict[str, float]
    verdict: Verdict
    gradient_norm: float


@dataclass(frozen=True)
class _Part:
    """A part of this process's share of a batch, on the device.

    Attributes:
        inputs: What the student takes: images, or features of a frozen backbone.
        labels: Their classes.
        targets: Features that frozen teachers keep of them.
        view: What teachers take of the same images, if it is another view.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    targets: tuple[torch.Tensor, ...]
    view: torch.Tensor | None


@dataclass(frozen=True)
class _Seen:
    """What the parts of a batch have shown of its cosines, for gates and scales of the steps to come."""

    confidences: list[torch.Tensor]
    hardness: list[torch.Tensor]


def take_step(run: Run, batch: DomainBatch) -> StepResult:
    """Takes one optimiser step on a batch of one domain; all processes have to call it, each with its share."""
    config, step, domain = run.config, run.step, batch.domain
    # Dropout, where a backbone has it, depends on seed, step and process alone.
    torch.manual_seed((config.seed * 1_000_003 + step) * 8191 + run.accelerator.process_index)
    run.idle_heads.catch_up(domain, step)
    set_learning_rates(run.optimizer, learning_rates(config.optim, step, run.num_steps))
    run.model.progress = step / run.num_steps
    classes = run.sampled_classes.take(domain, batch.labels, step, run.accelerator.device)
    loss, losses, seen = _backward(run, _parts(run, batch), domain, classes)
    centred = CentredStep(run.model) if config.model.centre_features else None
    judgement = _judge(run, domain, torch.stack([loss, *losses.values()]))
    # AdamW reads on the device whether it may move, see `StepGuard`.
    run.wrapped_optimizer.step()
    if centred is not None:
        centred.finish()
    run.wrapped_optimizer.zero_grad(set_to_none=True)
    applied = judgement.verdict == Verdict.APPLIED
    if run.wrapped_optimizer.step_was_skipped:  # By a gradient scaler, which has asked the device already.
        applied = torch.zeros_like(applied)
    run.sampled_classes.put_back(step, applied)
    run.average.update(step)
    if seen.confidences:
        run.model.observe_confidences(domain, torch.stack(seen.confidences).mean(0), applied)
    if seen.hardness:
        run.model.observe_hardness(domain, torch.cat(seen.hardness), applied)
    return StepResult(step, domain, loss, losses, judgement.verdict, judgement.norm)


def fetch_losses(results: Sequence[StepResult], accelerator: Accelerator) -> list[StepLosses]:
    """Brings steps from the device, averaged over processes; all processes have to call it, with the same steps."""
    if not results:
        return []
    columns = {name: torch.stack([result.losses[name] for result in results]) for name in results[0].losses}
    totals = torch.stack([result.loss for result in results])
    totals, columns = accelerator.reduce((totals, columns), reduction="mean")
    terms = {name: column.tolist() for name, column in columns.items()}
    verdicts = torch.stack([result.verdict for result in results]).tolist()
    norms = torch.stack([result.gradient_norm for result in results]).tolist()
    return [
        StepLosses(
            result.step,
            result.domain,
            total,
            {name: values[number] for name, values in terms.items()},
            Verdict(verdict),
            norm,
        )
        for number, (result, total, verdict, norm) in enumerate(
            zip(results, totals.tolist(), verdicts, norms, strict=True)
        )
    ]


def _parts(run: Run, batch: DomainBatch) -> list[_Part]:
    """Brings a batch to the device, normalised, and cuts it into the parts whose gradients are added up."""
    device, number = run.accelerator.device, run.config.train.accumulation_steps
    # The images of a source, whose labels are read, come before those of the target.
    sides = (batch,) if batch.source is None else (batch.source, batch)
    inputs = _normalised(run, torch.cat([side.pixels.to(device, non_blocking=True) for side in sides]))
    labels = sides[0].labels.to(device, non_blocking=True)
    # (B, D) of each teacher -> (B / number, D) of each teacher, for each part
    targets = list(zip(*(target.chunk(number) for target in _targets(run, batch)), strict=True)) or [()] * number
    views: Sequence[torch.Tensor | None] = [None] * number
    if batch.teacher_view is not None:
        views = _normalised(run, batch.teacher_view.pixels.to(device, non_blocking=True)).chunk(number)
    return [_Part(*part) for part in zip(inputs.chunk(number), labels.chunk(number), targets, views, strict=True)]


def _normalised(run: Run, inputs: torch.Tensor) -> torch.Tensor:
    return inputs if isinstance(run.model.inputs, CachedInputs) else run.statistics.normalize(inputs)


def _backward(
    run: Run, parts: Sequence[_Part], domain: str, classes: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], _Seen]:
    """Adds up the gradients of the batch's parts; returns loss and terms, averaged over them, and what was seen."""
    banks = _relational_banks(run, parts, domain)
    ramp = run.config.ablation.distillation_ramp_steps
    share = min(1.0, (run.step + 1) / ramp) if ramp else 1.0
    loss = torch.zeros((), device=run.accelerator.device)
    losses = {name: torch.zeros_like(loss) for name in run.model.terms}
    seen = _Seen([], [])
    for number, (part, bank) in enumerate(zip(parts, banks, strict=True)):
        values = {"distillation_share": share, "sampled_classes": classes, "targets": part.targets, "view": part.view}
        # Gradients cross processes once, with the last part.
        with nullcontext() if number == len(parts) - 1 else run.accelerator.no_sync(run.wrapped):
            output = run.wrapped(part.inputs, part.labels, domain, bank, **values)
            run.accelerator.backward(output.loss / len(parts))
        loss += output.loss.detach().float() / len(parts)
        for name, value in output.losses.items():
            losses[name] += value.detach().float() / len(parts)
        if output.confidences is not None:
            seen.confidences.append(output.confidences)
        if output.hardness is not None:
            seen.hardness.append(output.hardness)
    return loss, losses, seen


def _judge(run: Run, domain: str, losses: torch.Tensor) -> Judgement:
    """Averages the gradients of the domain's heads over processes, clips, and says whether the step is applied."""
    config, processes = run.config, run.accelerator.num_processes
    faulty = 1 - losses.isfinite().all().float()
    if processes > 1:
        heads = (*run.shared_heads, *run.model.domain_parameters(domain).values())
        # Prototypes in shards have their whole gradient already.
        ours = [parameter for parameter in heads if not isinstance(parameter, DTensor)]
        faulty = average_gradients(ours, processes, faulty)
    norm = None
    if config.optim.max_grad_norm is not None:
        norm = _clip_gradients(run, config.optim.max_grad_norm)
    return run.guard.judge(domain, faulty, norm)


def _targets(run: Run, batch: DomainBatch) -> list[torch.Tensor]:
    teachers = run.model.feature_teachers
    if teachers is None:
        return []
    assert batch.rows is not None, "every batch of training data says which rows it has"
    return teachers.targets(batch.domain, batch.rows, run.accelerator.device)


def _relational_banks(run: Run, parts: Sequence[_Part], domain: str) -> list[RelationalBank | None]:
    """Embeds the global batch once more without gradient, so that each accumulated part sees all others' pairs."""
    teachers = run.model.feature_teachers
    is_relational = run.config.loss.relational_distillation > 0 or teachers is not None
    if len(parts) == 1 or not is_relational:
        return [None] * len(parts)
    with torch.no_grad(), run.accelerator.autocast():
        of_parts = [run.model.embed(part.inputs, domain, part.targets, part.view) for part in parts]
    size = len(parts[0].inputs)
    start = run.accelerator.process_index * size * len(parts)
    whole = RelationalBank.gathered(run.accelerator.gather, Embeddings.joined(of_parts), start)
    return [replace(whole, position=start + number * size) for number in range(len(parts))]


def _clip_gradients(run: Run, max_norm: float) -> torch.Tensor:
    parameters = with_gradients(run.optimizer)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return clip_gradients(parameters, max_norm)
    norm: torch.Tensor = run.accelerator.clip_grad_norm_(parameters, max_norm)
    return norm
