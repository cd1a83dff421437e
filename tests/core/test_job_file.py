"""A job on disk is the same job: field for field, and bit for bit in what it computes."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassbox.flux_core.errors import CheckpointError, SettingError
from glassbox.flux_core.families import FLUX2_KLEIN_9B_KV, FLUX2_KLEIN_BASE_4B
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.job_file import FORMAT, read_job, write_job
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import flux_sigmas, parse_sigmas
from glassbox.flux_core.tokens.ids import drop_tokens
from glassbox.flux_core.transformer.flux import cache_for_the_run
from glassbox.flux_core.values import Reference, TokenCount
from glassbox.tests.core import tiny_flux1, tiny_flux2

FALLING = parse_sigmas("0.83, 0.3333333, 0.1, 0")


def guided() -> Job:
    """FLUX.1, with all that a conditioning may hold."""
    one = tiny_flux1.conditioning(1)
    whole = tiny_flux1.picture(2, size=48)
    part = drop_tokens(whole, torch.arange(whole.count) % 3 != 1)
    counts = (TokenCount(encoder="T5", used=7, limit=512, cut="the rest"),)
    text = replace(one.text, counts=counts, notes=("long.",), source="CLIP-L and T5")
    seen = (Reference(tokens=tiny_flux1.picture(1)), Reference(tokens=part, name="the chair"))
    return Job(
        conditioning=replace(one, text=text, references=seen, notes=("a note — ünïcode.",)),
        noise=tiny_flux1.noise(3, batch=2),
        sigmas=FALLING,
        solver="dpm++ 2m",
        start=replace(tiny_flux1.noise(4), is_noise=False),
    )


def true_cfg(passes: str = "batched", family=FLUX2_KLEIN_BASE_4B) -> Job:
    references = tiny_flux2.pictures(1, 2)
    noise = tiny_flux2.noise(3, batch=2)
    negative = tiny_flux2.conditioning(2, references)
    return Job(
        conditioning=tiny_flux2.conditioning(1, references),
        noise=noise,
        sigmas=flux_sigmas(family.schedule, noise.count, 4),
        solver="heun",
        cfg=TrueCFG(negative=negative, scale=3.5, start=0.25, end=0.75, passes=passes),
    )


JOBS = {
    "guided": (lambda: tiny_flux1.network(), guided),
    "true cfg": (lambda: tiny_flux2.network(FLUX2_KLEIN_BASE_4B), true_cfg),
    "true cfg in turn": (
        lambda: tiny_flux2.network(FLUX2_KLEIN_BASE_4B),
        lambda: true_cfg("in turn"),
    ),
    "isolated references": (
        lambda: tiny_flux2.network(FLUX2_KLEIN_9B_KV),
        lambda: true_cfg("in turn", FLUX2_KLEIN_9B_KV),
    ),
}


def written(job: Job, folder: Path) -> Path:
    path = folder / "job.json"
    write_job(job, path)
    return path


def assert_same(one, other, where: str = "job") -> None:
    """Every field, every tensor's dtype and bits."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif is_dataclass(one):
        for field in fields(one):
            name = f"{where}.{field.name}"
            assert_same(getattr(one, field.name), getattr(other, field.name), name)
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("name", JOBS)
def test_a_job_read_back_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    network, make = JOBS[name]
    job = make()
    again = read_job(written(job, tmp_path))
    assert_same(job, again)
    net = network()
    runs = [run(net, one) for one in (job, again)]
    assert runs[0].notes == runs[1].notes
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.denoised, other.denoised)
    assert float(one.x.std()) > 0.1


def test_controls_and_dtypes_are_written_too(tmp_path: Path) -> None:
    job = guided()
    first = job.conditioning.references[0]
    mask = torch.linspace(0, 1, first.tokens.count, dtype=torch.float16)
    seen = replace(first, strength=0.3, mask=mask, steps=(0.1, 0.7), blocks=(0, 2))
    text = replace(job.conditioning.text, txt=job.conditioning.text.txt.bfloat16())
    one = replace(job.conditioning, references=(seen,), text=text, guidance=None)
    job = replace(job, conditioning=one)
    assert_same(job, read_job(written(job, tmp_path)))


def test_references_that_two_conditionings_share_stay_shared(tmp_path: Path) -> None:
    """Written once, and one tensor again when read: isolated references are computed once."""
    job = true_cfg("in turn", FLUX2_KLEIN_9B_KV)
    path = written(job, tmp_path)
    again = read_job(path)
    pairs = zip(again.conditioning.references, again.cfg.negative.references, strict=True)
    assert all(one.tokens.values is other.tokens.values for one, other in pairs)
    net, computed = tiny_flux2.network(FLUX2_KLEIN_9B_KV), []
    net.reference_cache = lambda *both: computed.append(both) or cache_for_the_run(*both)
    run(net, again)
    assert len(computed) == 1
    held = load_file(path.with_suffix(".safetensors"))
    shape = job.conditioning.references[0].tokens.values.shape
    assert sum(tensor.shape == shape for tensor in held.values()) == 1


def test_a_view_is_written_alone(tmp_path: Path) -> None:
    """A slice of a large tensor takes its own bytes on disk, not the large one's."""
    job = true_cfg()
    large = torch.randn(64, *job.noise.values.shape[1:])
    job = replace(job, noise=replace(job.noise, values=large[3:5]))
    path = written(job, tmp_path)
    assert torch.equal(read_job(path).noise.values, large[3:5])
    assert path.with_suffix(".safetensors").stat().st_size < large.nbytes


def test_edits_are_code_and_refused(tmp_path: Path) -> None:
    job = replace(guided(), edits=(lambda x, sigma: x,))
    with pytest.raises(SettingError, match="1 edits"):
        write_job(job, tmp_path / "job.json")
    assert list(tmp_path.iterdir()) == []


def _another_format(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))


def _without_a_tensor(path: Path) -> None:
    file = path.with_suffix(".safetensors")
    tensors = load_file(file)
    del tensors["noise.values"]
    save_file(tensors, file)


def _half(path: Path) -> None:
    file = path.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "FileNotFoundError"),
        (lambda path: path.with_suffix(".safetensors").unlink(), "FileNotFoundError"),
        (lambda path: path.write_text(path.read_text()[:-30]), "JSONDecodeError"),
        (lambda path: path.write_text('{"prompt": {}}'), "KeyError: 'format'"),
        (lambda path: path.write_text("[1, 2]"), "TypeError"),
        (lambda path: path.write_text(path.read_text().replace("4,\n   3", "")), "ValueError"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
        (_another_format, f"format {FORMAT + 1}"),
        (_without_a_tensor, "KeyError: 'noise.values'"),
        (_half, "SafetensorError"),
    ],
)
def test_what_is_no_job_is_refused(damage, words: str, tmp_path: Path) -> None:
    path = written(true_cfg(), tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_job(path)
    assert caught.value.found.startswith("job.json holds no job")
