"""What the MLP adds over one learned number a layer, on made-up runs."""

from dataclasses import replace

import pytest
from test_report_rules import comparison, run

from oplora.report import ablation


@pytest.mark.parametrize(
    ("mlp", "told"),
    [
        ([1.8, 1.9, 2.0], "ahead of one number a layer in 1 of 1 settings"),  # by 0.1 each time
        ([2.0, 2.1, 2.2], "ahead of one number a layer in 0 of 1 settings, behind in 1,"),
        ([1.7, 2.1, 1.9], "behind in 0, and in 1 the seeds do not tell"),  # by 0.2, -0.1 and 0.2
    ],
)
def test_what_the_mlp_adds_is_told_by_the_seeds_that_both_have(mlp, told):
    losses = {"lora": [2.2, 2.3, 2.4], "oplora_scalar": [1.9, 2.0, 2.1], "oplora": mlp}
    runs = [
        run(m, 1e-2, seed, loss) for m, each in losses.items() for seed, loss in enumerate(each)
    ]
    runs += [run("oplora", 1e-2, 3, 9.0), run("lora", 1e-1, 0, 5.0)]
    base = [run("base", 0.0, loss=3.0, fine_tune=False)]
    c = replace(comparison({}), records=runs, base=base)
    cells = ablation.row(c).cells
    assert cells["OP-LoRA, one number"] == "2.000 ± 0.248 (3)"
    assert cells["one number over LoRA"] == "+0.300 ± 0.000 (3)"
    assert cells["HyperLoader"].command.startswith("scripts/sweep_learning_rates.sh vl_bart")
    sentence = ablation.sentence([c])
    assert "one learned number a layer is ahead of LoRA in 1 of 1 settings, behind in 0" in sentence
    assert told in sentence
    alone = [r for r in runs if r.config["method"]["name"] != "oplora_scalar"]
    assert ablation.section([c]) and ablation.section([replace(c, records=alone)]) is None
