"""Subjects (v2's abstract): how near drawings come to the subject, and to the prompt's text."""

from collections.abc import Sequence

from oplora.report.claims import better
from oplora.report.comparison import final_loss
from oplora.report.experiment import Experiment
from oplora.report.figures import Curves
from oplora.report.metrics import Column, Score
from oplora.report.tables import Groups

TITLES = {"dino": "DINO", "clip_i": "CLIP-I", "efficientnet": "EfficientNet", "clip_t": "CLIP-T"}
DIGITS = {"dino": 3, "clip_i": 3, "efficientnet": 3, "clip_t": 1}


def columns(final: Groups) -> Sequence[Column]:
    """The metrics that these runs have: of the subject, then of the text (100 × cosine)."""
    metrics = next(iter(final.values()))[0].metrics
    return [
        Column(title, name, DIGITS[name], 1, higher=True)
        for name, title in TITLES.items()
        if name in metrics
    ]


def subject_metric(record) -> float | None:
    """The first metric of subject fidelity that the run has."""
    return next((record.metrics[name] for name in TITLES if name in record.metrics), None)


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
    theses=(better("OP-LoRA is better than LoRA", "v2's abstract (DreamBench)", "oplora", "lora"),),
)
