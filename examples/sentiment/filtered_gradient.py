"""Does a filtered gradient train the same model? Runs the demo four times: exact and filtered, float32 and bfloat16.

    python examples/sentiment/filtered_gradient.py --save-results    # four trainings of about three minutes each

Writes filtered_gradient.json (losses of every step, held-out figures, dropped mass), and from it the plot and the table
in docs/linear.md; without --save-results it only prints. `--page` redraws plot and table from the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import run
import smollm2

from dpo_trainer import DPOTrainer, load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "filtered_gradient.json"
PAGE = HERE.parent.parent / "docs" / "linear.md"
PLOT = PAGE.with_name("filtered_gradient.svg")

# The settings that differ between the runs. bf16: autocast on float32 weights; its "auto" is 2^-16.
RUNS: dict[str, dict[str, Any]] = {
    "float32, exact": {"grad_filter": None},
    "float32, eps 2^-16": {"grad_filter": 2.0**-16},
    "bfloat16, exact": {"grad_filter": None, "bf16": True},
    "bfloat16, auto": {"grad_filter": "auto", "bf16": True},
}


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train on the demo's pairs. Returns the loss of every step, and held-out loss and accuracy after the last step."""
    folder = smollm2.model_folder()
    rewards = measure.Rewards()
    held_out = measure.read_rows(HERE / "held_out.jsonl")
    arguments = run.settings(
        options.output_dir / name.replace(", ", "-").replace(" ", ""),
        options,
        logging_steps=1,
        loss_path="linear",
        statistics=["entropy", "kl", "accuracy", "grad_dropped_mass"],
        **RUNS[name],
    )
    trainer = DPOTrainer(
        load_model(folder),
        args=arguments,
        train_dataset=measure.read_rows(HERE / "train.jsonl"),
        eval_dataset=run.pairs_only(held_out),
        processing_class=load_tokenizer(folder),
        compute_metrics=rewards,
    )
    trainer.train()
    trainer.evaluate()
    logs = [record for record in trainer.state.log_history if "learning_rate" in record]
    dropped = [record["grad_dropped_mass"] for record in logs]
    return {
        **measure.figures(measure.held_out(rewards.values, [row["prompt"] for row in held_out])),
        "grad_dropped_mass": sum(dropped) / len(dropped),
        "losses": [record["loss"] for record in logs],
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The loss curves, and below them the distance of each filtered curve from the exact curve of its dtype."""
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "filtered_gradient", "svg.fonttype": "none", "font.size": 9})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    colours = {"float32": "#1f5fa8", "bfloat16": "#c0392b"}
    for name, result in results["runs"].items():
        dtype, kind = name.split(", ")
        steps = range(1, len(result["losses"]) + 1)
        style = {"color": colours[dtype], "linewidth": 2.6 if kind == "exact" else 1.2}
        above.plot(steps, result["losses"], alpha=0.35 if kind == "exact" else 1.0, label=name, **style)
        if kind != "exact":
            exact = results["runs"][f"{dtype}, exact"]["losses"]
            below.plot(steps, [a - b for a, b in zip(result["losses"], exact, strict=True)], label=dtype, **style)
    above.axhline(0.6931472, color="grey", linewidth=0.8, linestyle=":")
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    below.axhline(0.0, color="grey", linewidth=0.8)
    below.set_ylabel("filtered - exact")
    below.set_xlabel("step")
    below.legend(frameon=False, ncols=2, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def table(results: dict[str, Any]) -> str:
    """Markdown table of the runs, and the machine they were made on."""
    lines = ["| gradient | held-out loss | held-out accuracy | dropped mass |", "|---|---:|---:|---:|"]
    for name, result in results["runs"].items():
        loss, accuracy = result["held_out_loss"], result["held_out_accuracy"]
        lines.append(f"| {name} | {loss:.4f} | {accuracy:.1%} | {result['grad_dropped_mass']:.2%} |")
    machine, versions = results["machine"], results["versions"]
    where = f"{results['date']}, {machine['cores']} cores of {machine['cpu']} ({machine['instructions']})"
    return "\n".join([*lines, "", f"{results['steps']} steps of the demo; {where}, torch {versions['torch']}."])


def main() -> None:
    if "--page" in sys.argv[1:]:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        draw(results, PLOT)
        measure.put_between_marks(PAGE, table(results))
        return
    options = measure.read_options(
        __doc__.splitlines()[0],
        steps=run.STEPS,
        learning_rate=run.LEARNING_RATE,
        folder=Path("runs/filtered-gradient"),
        has_control=False,
    )
    measure.keep_quiet()
    runs = {}
    for name in RUNS:
        print(f"training: {name} ...", flush=True)
        runs[name] = train(name, options)
    results = measure.rounded({"steps": options.steps, "seed": options.seed, "runs": runs, **measure.environment()}, 6)
    print(table(results))
    if options.save_results:
        measure.write_json(RESULTS, results)
        draw(results, PLOT)
        measure.put_between_marks(PAGE, table(results))


if __name__ == "__main__":
    main()
