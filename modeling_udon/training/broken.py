"""Images that cannot be read on the way: skipped, counted, named, and too many of them end the run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_udon.data.dataset import BrokenImage, BrokenImageError, DomainBatch
from modeling_udon.training.logging import keep_rows

# A share is taken of at least so many images, so that the first ones cannot end a run.
MIN_DRAWN = 1000


class BrokenImages:
    """The broken images of a run, in `broken.jsonl` a row each.

    Args:
        path: The file.
        max_share: Share of the images drawn from a domain that may be broken.
        accelerator: Knows the other processes.
        counts: How many broken images were drawn from each domain before `step`.
        step: Step that the run goes on from; what was found later is forgotten.

    Attributes:
        counts: How many broken images have been drawn from each domain, a repeated one each time.
    """

    def __init__(
        self, path: Path, max_share: float, accelerator: Accelerator, counts: Mapping[str, int], step: int
    ) -> None:
        self.counts = dict(counts)
        self._path = path
        self._max_share = max_share
        self._is_main = accelerator.is_main_process
        self._pending: list[tuple[int, BrokenImage]] = []
        self._named: set[tuple[str, str, int]] = set()
        if self._is_main:
            keep_rows(path, step if step else -1)
            if path.exists():
                rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                self._named = {(row["domain"], row["split"], row["row"]) for row in rows}

    def collect(self, batch: DomainBatch, step: int) -> None:
        """Takes up what this process has skipped in a step."""
        self._pending += [(step, image) for image in batch.broken]

    def count(self, num_drawn: Mapping[str, int]) -> list[str]:
        """Counts and names what all processes have skipped since the last time; all must call it.

        Args:
            num_drawn: Images drawn from each domain so far.

        Returns:
            A line for each domain with new ones.

        Raises:
            BrokenImageError: If they are more than the share that may be.
        """
        found = sorted(gather_object(self._pending), key=lambda item: (item[0], item[1].position))
        self._pending = []
        lines = []
        for domain in sorted({image.domain for _, image in found}):
            images = [image for _, image in found if image.domain == domain]
            self.counts[domain] = self.counts.get(domain, 0) + len(images)
            self._name([item for item in found if item[1].domain == domain])
            told = f"{self.counts[domain]} of {num_drawn[domain]:,} images drawn from {domain} are broken"
            lines.append(f"WARNING: {told} and were replaced, the last: {images[-1]}; all in {self._path}")
            if self.counts[domain] > self._max_share * max(num_drawn[domain], MIN_DRAWN):
                raise BrokenImageError(
                    f"`data.max_broken_share` allows {self._max_share:g}, but {told}. The last: {images[-1]}; mend "
                    f"the data that {self._path} names and start again, or allow more and go on with --resume."
                )
        return lines

    def leave_out(self, images: Sequence[BrokenImage], step: int) -> None:
        """Names images that an evaluation has left out.

        Raises:
            BrokenImageError: If there is one and none may be.
        """
        if images and self._max_share == 0:
            raise BrokenImageError(str(images[0]))
        self._name([(step, image) for image in images])

    def _name(self, found: Iterable[tuple[int, BrokenImage]]) -> None:
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for step, image in found:
                key = (image.domain, image.split, image.row)
                if key not in self._named:
                    self._named.add(key)
                    row = asdict(image)
                    del row["position"]
                    file.write(json.dumps({"step": step, **row}) + "\n")
