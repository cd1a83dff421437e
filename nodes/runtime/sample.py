"""Running a Job under ComfyUI."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...flux_core.specs import FluxFamily
from ...flux_core.values import Tokens
from .. import host
from .reference_cache import ReferenceKV

if TYPE_CHECKING:
    from ...flux_core.sampling.job import Job
    from ...flux_core.sampling.run import Run


class Handle(Protocol):
    """A model that can sample: one of this pack's loaders, or a native MODEL."""

    family: FluxFamily
    patcher: Any  # of the part that steps

    @property
    def model_sampling(self) -> Any:
        """ComfyUI's noise levels that a MODEL carries; None: FLUX's own."""
        ...

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        ...

    def ready(
        self, job: "Job", reference_kv: ReferenceKV = "auto", *, may_stop: bool = False
    ) -> AbstractContextManager["Run"]:
        """Yields a job on this model, planned and with its weights loaded."""
        ...


def sample(handle: Handle, job: "Job", reference_kv: ReferenceKV = "auto") -> Tokens:
    """Samples with the job's solver, under ComfyUI's progress, previews and cancelling.

    Raises:
        GlassboxError: inputs that do not go together, or more than memory holds.
    """
    from ...flux_core.sampling.run import finish  # with the first use: it takes time

    with handle.ready(job, reference_kv) as planned:
        host.notify(planned.notes)
        last = host.drive(planned, handle.device)
    return finish(host.to_outputs(last.x), job.noise)
