"""The README.md of an exported pipeline: what the network is, how it came about, how to use it, what it is not.

Everything in it is read from the checkpoint and from what was measured with that very checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAPERS = {
    "DiffuSSM": "Yan, Gu, Rush: Diffusion Models Without Attention. CVPR 2024. [arXiv 2311.18257]"
    "(https://arxiv.org/abs/2311.18257)",
    "DiT": "Peebles, Xie: Scalable Diffusion Models with Transformers. ICCV 2023. [arXiv 2212.09748]"
    "(https://arxiv.org/abs/2212.09748)",
}
DDPM = "DDPMScheduler"
PIXELS = "identity"  # the autoencoder that is none
KINDS = {"DiffuSSM": "state-space-model", "DiT": "diffusion-transformer"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Attributes:
        folder: name of the exported folder.
        parameters: how many the network has.
        weights: name of the exported weights, ema_<decay> or model.
        config: the resolved configuration of the training run.
        train_state: where training stood, with the fingerprint of the data.
        checkpoint_sha256: hash of the whole checkpoint.
        scheduler: class name of the exported scheduler.
        autoencoder: fingerprint of what turns latents into images.
        versions: of diffussm, torch and diffusers at the export.
        results: what `diffussm evaluate` measured of samples of these weights, if it did.
        image_results: the same of the bound on real images.
    """

    folder: str
    parameters: int
    weights: str
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    checkpoint_sha256: str
    scheduler: str
    autoencoder: Mapping[str, Any]
    versions: Mapping[str, str]
    results: Mapping[str, Any] | None
    image_results: Mapping[str, Any] | None


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, with the YAML head that model hubs read."""
    architecture = _name(facts.config["model"])
    sections = {
        "The network": _network(facts, architecture),
        "Training": _training(facts),
        "Sampling": _sampling(facts),
        "Results": _results(facts),
        "Limits": _limits(facts),
        "Citation": f"The architecture: {PAPERS[architecture]}",
    }
    title = f"{architecture} `{facts.config['name']}`"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"{_head(facts, architecture)}\n\n# {title}\n\n{_summary(facts, architecture)}\n\n{body}\n"


def guidance_scale(config: Mapping[str, Any]) -> float:
    """The scale of classifier-free guidance that a configuration samples with; 1 if it guides otherwise."""
    guidance = config["guidance"]
    return guidance["scale"] if _name(guidance) == "ClassifierFree" else 1.0


def _head(facts: CardFacts, architecture: str) -> str:
    conditional = facts.config["model"]["num_classes"] is not None
    generation = "class-conditional-image-generation" if conditional else "unconditional-image-generation"
    tags = ["diffusers", "diffussm", "diffusion", KINDS[architecture], generation]
    return "\n".join(["---", "library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(facts: CardFacts, architecture: str) -> str:
    channels, height, width = facts.train_state["data"]["image_shape"]
    num_classes = facts.config["model"]["num_classes"]
    of = "any kind it has seen" if num_classes is None else f"{num_classes} classes"
    return (
        f"A diffusion network ({architecture}, {facts.parameters:,} parameters) that draws "
        f"{'grey' if channels == 1 else 'colour'} images of {height}x{width} pixels, of {of}, "
        f"{_through(facts.autoencoder)}. Exported with diffussm as a pipeline for diffusers."
    )


def _through(autoencoder: Mapping[str, Any]) -> str:
    if autoencoder["kind"] == PIXELS:
        return "without an autoencoder"
    channels, factor = autoencoder["latent_channels"], autoencoder["factor"]
    return f"as latents of {channels} channels and 1/{factor} of the sides, which a frozen autoencoder decodes"


def _network(facts: CardFacts, architecture: str) -> str:
    model = facts.config["model"]
    arguments = {key: value for key, value in model.items() if key != "_target_"}
    rows = {
        "architecture": architecture,
        "parameters": f"{facts.parameters:,}",
        "arguments": _listed(arguments),
    }
    if facts.autoencoder["kind"] != PIXELS:
        rows["autoencoder, in vae/"] = _listed(facts.autoencoder)
    return _table(["", ""], [[key, value] for key, value in rows.items()])


def _training(facts: CardFacts) -> str:
    config, state = facts.config, facts.train_state
    rows = {}
    if state.get("imported"):
        source = state["imported"]
        rows["began with"] = f"imported weights: {source['file']}, SHA-256 {source['sha256']}"
    if state["images"]:
        trainer = config["trainer"]
        rows |= {
            "data": _listed(state["data"]),
            "images seen": f"{state['images']:,}",
            "steps": f"{state['step']:,}",
            "batch size": f"{trainer['batch_size']:,}",
            "optimiser": _describe(config["optimizer"]),
            "warm-up, decay": f"{trainer['warmup_images']:,} and {trainer['decay_images']:,} images",
            "largest gradient norm": _text(trainer["max_grad_norm"]),
            "objective": _describe(config["objective"]),
            **_schedule(facts),
            "precision": trainer["precision"],
            "seed": _text(config["seed"]),
            "weights": _weights(facts.weights),
        }
    else:
        rows["images seen"] = "none since: how these weights were trained is not recorded here"
        rows |= _schedule(facts)
    rows["checkpoint"] = f"SHA-256 {facts.checkpoint_sha256}"
    rows["exported with"] = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return _table(["", ""], [[key, value] for key, value in rows.items()])


def _schedule(facts: CardFacts) -> dict[str, str]:
    return {"noise schedule": _describe(facts.config["diffusion"])} if facts.scheduler == DDPM else {}


def _weights(name: str) -> str:
    if name == "model":
        return "as they were after the last step, not averaged"
    kind, _, number = name.rpartition("_")
    if kind == "ema":
        return f"exponential moving average, decay {number}"
    return f"power-function moving average (EDM2), sigma_rel {number}"


def _sampling(facts: CardFacts) -> str:
    config = facts.config
    num_classes, sampler = config["model"]["num_classes"], config["sampler"] or {}
    steps = sampler["num_steps"] if isinstance(sampler.get("num_steps"), int) else 50
    if num_classes is None:
        what = "num_images=4"
    else:
        what = f"class_labels={[index % num_classes for index in range(4)]}, "
        what += f"guidance_scale={guidance_scale(config)}"
    code = [
        "import torch",
        "from diffussm.pipeline import DiffuSSMPipeline",
        "",
        f'pipe = DiffuSSMPipeline.from_pretrained("{facts.folder}")',
        "generators = [torch.Generator().manual_seed(index) for index in range(4)]",
        f"images = pipe({what}, num_inference_steps={steps}, generator=generators).images",
    ]
    text = [
        "With diffussm installed:",
        "\n".join(["```python", *code, "```"]),
        f"The pipeline samples with diffusers' {facts.scheduler}."
        + (
            f" The run itself was configured to sample with {_describe(sampler)} and "
            f"{_describe(config['guidance'])}."
            if sampler
            else ""
        ),
    ]
    if facts.scheduler == DDPM:
        text.append(
            "Other schedulers: `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`; "
            "DDIMScheduler needs `timestep_spacing='trailing'` besides."
        )
    return "\n\n".join(text)


def _results(facts: CardFacts) -> str:
    parts = [part for part in (_sample_results(facts), _image_results(facts)) if part]
    return "\n\n".join(parts) or "Nothing was measured with these weights before they were exported."


def _image_results(facts: CardFacts) -> str | None:
    results = facts.image_results
    if results is None:
        return None
    metrics, request = results["image_metrics"], results["request"]
    return (
        f"Variational bound: {_number(metrics['vlb'])} bits per dimension on {metrics['num_samples']:,} images "
        f"({_listed(request['data'])}), measured by `diffussm evaluate metrics=[vlb]`, seed "
        f"{request['sampling']['seed']}, {request['sampling']['precision']}."
    )


def _sample_results(facts: CardFacts) -> str | None:
    results = facts.results
    if results is None:
        return None
    shown = {"these weights": results["metrics"]}
    if results["real_against_real"]:
        shown["real against real"] = results["real_against_real"]
    metrics = [key for key in results["metrics"] if key not in ("num_samples", "images_per_second", "intervals")]
    rows = [
        [name, f"{row['num_samples']:,}", *(_number(row.get(key)) for key in metrics)]
        for name, row in shown.items()
    ]
    request = results["request"]
    sampling, extractor, reference = request["sampling"], request["extractor"], request["reference"]
    return (
        f"{_table(['', 'images', *metrics], rows)}\n\nMeasured by `diffussm evaluate` with its own sampler "
        f"{_describe(request['sampler'])}, {_describe(request['guidance'])}, seed {sampling['seed']}, "
        f"{sampling['precision']}; features of {extractor['name']} (SHA-256 {extractor['sha256']}) against "
        f"{reference['file']} (SHA-256 {reference['sha256']}); pixels {request['pixels']}."
    )


def _limits(facts: CardFacts) -> str:
    _, height, width = facts.train_state["data"]["image_shape"]
    limits = [f"Its images have {height}x{width} pixels and show what its training data show."]
    if facts.results is None:
        limits.append("How good its images are was not measured.")
    else:
        limits.append(f"The figures above hold for that sampler and guidance, not for {facts.scheduler}.")
        extractor = facts.results["request"]["extractor"]["name"]
        if f"FID-{extractor}" in facts.results["metrics"]:
            limits.append(
                f"FID-{extractor} is measured with the features of the network {extractor}, not of Inception: "
                "it is not comparable with FID."
            )
    limits.append("No licence is stated here.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _describe(node: Mapping[str, Any]) -> str:
    """A group of the configuration: `ddim (num_steps=25, eta=0.0)`."""
    options = {key: value for key, value in node.items() if key not in ("_target_", "checkpoint")}
    if "checkpoint" in node:  # of guidance; where it lies is no one else's business
        companion = node["checkpoint"]
        options["checkpoint"] = (
            f"SHA-256 {companion['sha256']}" if isinstance(companion, Mapping) else "another run"
        )
    return _name(node) + (f" ({_listed(options)})" if options else "")


def _name(node: Mapping[str, Any]) -> str:
    return node["_target_"].rpartition(".")[2]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
