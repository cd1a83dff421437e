"""Graphs in API form, built node by node."""

from typing import Any

from glassbox.tests.graph import tiny, tiny_flux2

Link = list[Any]


class Graph:
    """A graph under construction: `add` returns a node's id, `out` a link to one of its outputs."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        node = str(len(self.nodes) + 1)
        dotted = {name.replace("__", "."): value for name, value in inputs.items()}
        self.nodes[node] = {
            "class_type": class_type,
            "inputs": dotted,
            "_meta": {"title": class_type},
        }
        return node

    def out(self, node: str, slot: int = 0) -> Link:
        return [node, slot]


class Pipeline(Graph):
    """The tiny models, and the stages of a picture; every stage can be replaced."""

    def model(
        self, file: str = tiny.KONTEXT_FILE, family: str = "auto", dtype: str = "auto"
    ) -> Link:
        node = self.add("GlassboxLoadModel", file=file, family=family, dtype=dtype)
        return self.out(node)

    def klein(self) -> tuple[Link, Link, Link]:
        """Model, text encoder and autoencoder of the tiny FLUX.2 [klein]."""
        encoders = self.encoders(tiny_flux2.QWEN_4B_FILE, "none")
        autoencoder = self.autoencoder(tiny_flux2.AUTOENCODER_FILE)
        return self.model(tiny_flux2.KLEIN_FILE), encoders, autoencoder

    def encoders(self, file: str = tiny.CLIP_FILE, file_2: str = tiny.T5_FILE) -> Link:
        node = self.add("GlassboxLoadTextEncoders", file=file, file_2=file_2, dtype="auto")
        return self.out(node)

    def autoencoder(self, file: str = tiny.AUTOENCODER_FILE) -> Link:
        return self.out(self.add("GlassboxLoadAutoencoder", file=file, dtype="auto"))

    def text(self, encoders: Link, prompt: str = "make it red", **settings: Any) -> Link:
        inputs = {"prompt_2": "", "t5_tokens": 0, **settings}
        return self.out(
            self.add("GlassboxEncodeText", text_encoders=encoders, prompt=prompt, **inputs)
        )

    def picture(
        self, width: int = 64, height: int = 64, batch: int = 1, color: int = 0xFF8000
    ) -> Link:
        return self.out(
            self.add("EmptyImage", width=width, height=height, batch_size=batch, color=color)
        )

    def tokens(
        self, autoencoder: Link, image: Link, posterior: str = "mode", seed: int = 0
    ) -> Link:
        inputs = {"image": image, "posterior": posterior, "seed": seed}
        return self.out(self.add("GlassboxEncodeAndPack", autoencoder=autoencoder, **inputs))

    def conditioning(
        self, text: Link, *references: Link, guidance: float = 2.5, placement: str = "offset"
    ) -> Link:
        wired = {f"references__reference_{i}": one for i, one in enumerate(references, 1)}
        inputs = {"guidance": guidance, "placement": placement, **wired}
        return self.out(self.add("GlassboxReferenceConditioner", text=text, **inputs))

    def noise(
        self, model: Link, width: int = 64, height: int = 64, seed: int = 7, batch: int = 1
    ) -> Link:
        inputs = {"width": width, "height": height, "seed": seed, "batch_size": batch}
        return self.out(self.add("GlassboxNoise", model=model, **inputs))

    def sigmas(
        self, model: Link, noise: Link, steps: int = 2, kind: str = "flux", by_hand: str = ""
    ) -> Link:
        inputs = {"noise": noise, "steps": steps, "kind": kind, "sigmas": by_hand}
        return self.out(self.add("GlassboxSchedule", model=model, **inputs))

    def sample(
        self, model: Link, conditioning: Link, noise: Link, sigmas: Link, solver: str = "euler"
    ) -> Link:
        inputs = {"conditioning": conditioning, "noise": noise, "sigmas": sigmas, "solver": solver}
        return self.out(self.add("GlassboxSampleGuided", model=model, **inputs))

    def decode(self, autoencoder: Link, tokens: Link, fit: Link | None = None) -> Link:
        extra = {} if fit is None else {"fit": fit}
        node = self.add("GlassboxUnpackAndDecode", autoencoder=autoencoder, tokens=tokens, **extra)
        return self.out(node)

    def save(self, image: Link, prefix: str = "tiny") -> str:
        return self.add("SaveImage", images=image, filename_prefix=prefix)

    def show(self, text: Link) -> str:
        """Bring a STRING output into the history."""
        return self.add("PreviewAny", source=text)


def edit(
    *,
    model: str = tiny.KONTEXT_FILE,
    references: int = 1,
    steps: int = 2,
    size: int = 64,
    batch: int = 1,
    seed: int = 7,
    **settings: Any,
) -> Pipeline:
    """A whole edit with the tiny models, from files to a saved picture."""
    graph = Pipeline()
    network, autoencoder = graph.model(model), graph.autoencoder()
    text = graph.text(graph.encoders(), settings.pop("prompt", "make it red"))
    wired = [
        graph.tokens(autoencoder, graph.picture(size, size, color=0x102030 * (i + 1) % 0xFFFFFF))
        for i in range(references)
    ]
    conditioning = graph.conditioning(text, *wired, **settings)
    noise = graph.noise(network, size, size, seed, batch)
    sampled = graph.sample(network, conditioning, noise, graph.sigmas(network, noise, steps))
    graph.save(graph.decode(autoencoder, sampled))
    return graph
