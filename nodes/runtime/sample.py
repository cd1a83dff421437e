"""Runs a Job under ComfyUI, with its progress, previews and cancelling, or its samplers."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ...flux_core.sampling.job import Job
from ...flux_core.sampling.run import Run, finish
from ...flux_core.specs import FluxFamily
from ...flux_core.values import Tokens
from .. import host
from .reference_cache import ReferenceKV


class Handle(Protocol):
    """A model that can sample: one of this pack's loaders, or a native MODEL."""

    family: FluxFamily

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        ...

    def ready(
        self, job: Job, reference_kv: ReferenceKV = "auto", *, may_stop: bool = False
    ) -> AbstractContextManager[Run]:
        """Yields a job on this model, planned and with its weights loaded."""
        ...


def sample(
    handle: Handle, job: Job, reference_kv: ReferenceKV = "auto", sampler: Any = None
) -> Tokens:
    """Samples with the job's solver, or with one of ComfyUI's own SAMPLERs in its place.

    Raises:
        GlassboxError: inputs that do not go together, or more than memory holds.
    """
    if sampler is not None:
        from ..native.guider import sample_with  # imports this file's neighbours

        return sample_with(sampler, handle, job, reference_kv)
    with handle.ready(job, reference_kv) as planned:
        host.notify(planned.notes)
        last = host.drive(planned, handle.device)
    return finish(host.to_outputs(last.x), job.noise)
