"""Moving average of the student's weights, which stands for them wherever the student is measured and given out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.func import functional_call
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import Student

_STUDENT = ("udon.backbone.", "udon.student_head.")


class StudentAverage:
    """Exponential moving average of backbone and student head; teachers and prototypes stay as they are.

    Early in a run the average is over fewer steps, `(1 + step) / (10 + step)` in place of the decay, or a random head
    would weigh in it for long (as TensorFlow's moving averages count their updates).

    Args:
        model: The training model, where its weights will stay.
        decay: Share of the average that a step keeps; `None` averages nothing.
    """

    def __init__(self, model: UdonForDistillation, decay: float | None) -> None:
        trained = dict(model.named_parameters())
        values = {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            # Running statistics of a normalisation belong to the weights that they were gathered with.
            if name.startswith(_STUDENT)
            and value.is_floating_point()
            and (name not in trained or trained[name].requires_grad)
        }
        self._decay = decay
        self._model = model
        if model.feature_teachers is not None:
            model.feature_teachers.embed_by_average = self.embed
        self._values = {} if decay is None else {name: value.data for name, value in values.items()}
        self._averages = {name: value.clone() for name, value in self._values.items()}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by the names of the weights, which a checkpoint keeps; empty where nothing is averaged."""
        return dict(self._averages)

    @torch.no_grad()
    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeds a batch by the averaged student, as a teacher of the one that learns (arXiv 1703.01780).

        Args:
            inputs: What the training model takes, or the teachers' view of it.

        Returns:
            Shape `(batch_size, embedding_dim)`, unit norm.
        """
        udon = self._model.udon
        was_training = udon.training
        udon.eval()  # The average draws nothing: its dropout would take the student's random numbers.
        student = Student(udon, self._model.inputs, self._model.view_interpolates)
        embeds: torch.Tensor = functional_call(student, self._averages, (inputs,))
        udon.train(was_training)
        return embeds

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes up the averages of a checkpoint."""
        for name, average in self._averages.items():
            average.copy_(tensors[name].view_as(average))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Counts the weights in as they are after a step.

        Args:
            step: Number of the step, from 0.
        """
        if self._decay is not None:
            decay = min(self._decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(self._averages.values()), list(self._values.values()), step)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the averages in the model, and puts back the weights that training goes on from."""
        trained = {name: value.clone() for name, value in self._values.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._values.items():
            value.copy_(tensors[name])
