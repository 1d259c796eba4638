"""Subjects (v2's abstract): how near drawings come to the subject, and to the prompt's text."""

from collections.abc import Sequence

from oplora.report.claims import better
from oplora.report.comparison import Comparison, final_loss
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves, strips
from oplora.report.metrics import Column, Score
from oplora.report.page import Part, Row, Table
from oplora.report.tables import Groups
from oplora.report.titles import title

METRICS = {  # of the subject, then of the text: title and digits
    "dino": ("DINO", 3),
    "clip_i": ("CLIP-I", 3),
    "efficientnet": ("EfficientNet", 3),
    "clip_t": ("CLIP-T", 1),
}


def columns(final: Groups) -> Sequence[Column]:
    """The metrics that these runs have: of the subject, then of the text (100 × cosine)."""
    metrics = next(iter(final.values()))[0].metrics
    return [
        Column(title, name, digits, 1, higher=True)
        for name, (title, digits) in METRICS.items()
        if name in metrics
    ]


def subject_metric(record) -> float | None:
    """The first metric of subject fidelity that the run has."""
    return next((record.metrics[name] for name in METRICS if name in record.metrics), None)


def yardsticks(c: Comparison, final: Groups) -> list[Part]:
    """What a score is to be read against, and what every method draws of the subjects."""
    sticks = [(r, r.metrics["yardsticks"]) for r in c.base if "yardsticks" in r.metrics][:1]
    shown = columns(final) if final else []
    kinds = {"same": "real pictures of the subject, among themselves",
             "others": "real pictures of the other subjects"}  # fmt: skip
    rows = [
        Row({"pictures": told} | {column.title: f"{found[kind][column.metric]:.3f}"
                                  for column in shown if column.metric in found[kind]}, [r])
        for r, found in sticks
        for kind, told in kinds.items()
        if kind in found
    ]  # fmt: skip
    parts: list[Part] = []
    if rows:
        caption = f"{c.scope}: mean cosine to a subject's real pictures, of other pictures."
        parts.append(Table(f"{c.name}_yardsticks", caption, rows))
    if final:
        any_run = next(iter(final.values()))[0]
        files = {"real": any_run.path / "reference.png"}
        if c.base:
            files["base model"] = c.base[0].path / "samples.png"
        files |= {title(method): runs[0].path / "samples.png" for method, runs in final.items()}
        if files["real"].exists():
            names = ", ".join(any_run.metrics["subjects"])
            told = f"{c.scope}: one picture of each subject, {names}."
            parts.append(strips(f"{c.name}_grid", told, files))
    return parts


EXPERIMENT = Experiment(
    name="subjects",
    order=7,
    title="Subjects (v2's abstract)",
    paper="subjects.yaml",
    readme=("subjects_small",),
    loss=final_loss,
    loss_title="held-out denoising loss",
    loss_caption="Held-out denoising loss after training, mean over subjects, by learning rate",
    scores=(Score("subject fidelity", subject_metric, 3, 1, higher=True),),
    about="An adapter for each subject; a run's figures are means over its subjects. The learning "
    "rate of every method is the one with the lowest denoising loss on a held-out picture.",
    columns=columns,
    units="Mean cosine of features between drawn and real pictures; CLIP-T: 100 times that of "
    "picture and text.",
    curves=Curves("Held-out denoising loss during training"),
    more=yardsticks,
    theses=(better("OP-LoRA is better than LoRA", "v2's abstract (DreamBench)", "oplora", "lora"),),
)
