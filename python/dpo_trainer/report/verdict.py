"""The verdict on a run in one sentence: it worked, it failed, or its figures are unclear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..settings.diagnoses import DIAGNOSES, Limits
from ..watch.diagnoses import number
from .evaluation import Figures, figures_of
from .figures import figure, with_error

#: A run of fewer steps says nothing about its learning rate.
FEW_STEPS = 10


@dataclass(frozen=True)
class Verdict:
    """The verdict, which the report shows first.

    Attributes:
        word: "Worked", "Failed" or "Unclear".
        what: the reason, which follows the word, for instance "the learning rate is far too high".
        why: the figures.
        remedy: what to do next.
        cause: the name of the diagnosis that decided the verdict; "" if the figures decided it.
    """

    word: str
    what: str
    why: str
    remedy: str
    cause: str = ""


def judge(
    summary: dict[str, Any],
    evals: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]] = (),
) -> Verdict:
    """The verdict on a run.

    Args:
        summary: the result of `run_folder.summary.summarize`.
        evals: the records of the run's first evaluation dataset, without the prefix of their metrics.
        events: the records of events.jsonl, which are the diagnoses.
        samples: the policy's answers at the last evaluation.
    """
    found = figures_of(summary, evals)
    verdict = _of_events(summary, found, events, samples) or _of_figures(summary, found, bool(samples))
    if found and (ended := _ended_early(summary)):
        return replace(verdict, why=f"The run {ended}. {verdict.why}")
    return verdict


def _ended_early(summary: dict[str, Any]) -> str:
    """When the run ended, where that was before its last step: a diagnosis of `stop_on` or a callback stopped it."""
    steps, planned = summary.get("steps", 0), summary.get("planned_steps", 0)
    return f"ended at step {steps:,} of {planned:,}" if steps < planned and summary.get("finished", True) else ""


def _of_events(
    summary: dict[str, Any],
    found: Figures | None,
    events: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
) -> Verdict | None:
    """The verdict of the first diagnosis of a failure that the figures do not contradict, or of empty answers."""
    for event in by_cause(events):
        diagnosis = DIAGNOSES.get(event.get("name", ""))
        if diagnosis is not None and diagnosis.fails and holds(event, summary, found):
            why = f"{found.say()} " if found else ""
            training = number(summary["last"].get("rewards/accuracies"))
            if event["name"] == "pairs_swapped" and found and training > 0.5:
                why += f"In training the chosen answer wins in {training:.0%}: the two files were labelled by opposite rules."
            else:
                why += f"At step {event['step']:,}: {event['seen']}."
            kl = number((found.final if found else summary["last"]).get("kl"))
            if event["name"] == "learning_rate_high" and not math.isnan(kl):
                why += (
                    f" In the end the KL divergence is {kl:.2f} nats per token: the model no longer writes as it did."
                )
            # Weights of 0 may be those of the evaluation alone.
            word = "Unclear" if event["name"] == "weights_zero" and summary["last"].get("loss") else "Failed"
            return Verdict(word, _lower(event["title"]), why, event["remedy"], event["name"])
    empty = [record for record in samples if not record["policy"].strip()]
    if len(empty) > len(samples) / 2:
        return Verdict(
            "Failed",
            "the model's answers are empty",
            f"{len(empty)} of {len(samples)} sampled answers are empty." + (f" {found.say()}" if found else ""),
            f"{_learning_rate(summary, 0.1)}Look at the answers in the data: do they end at once?",
        )
    return None


def _of_figures(summary: dict[str, Any], found: Figures | None, sampled: bool) -> Verdict:
    if found is None:
        return _not_evaluated(summary)
    why, better = found.say(), _better(summary, found) if found.was_better else ""
    if found.wins and found.fell and found.won_before:
        return Verdict(
            "Unclear",
            "chosen answers won as often before training",
            f"{why} Before training it won in {figure(found.first['rewards/accuracies'], 'rewards/accuracies')}.",
            _more_pairs(found),
        )
    if found.wins and found.fell:
        if better:
            why += f" {_best_of(found)}"
            return Verdict("Worked", f"chosen answers win, and step {found.best['step']:,} was better", why, better)
        look = (
            "Read what the model writes, below." if sampled else "Set sample_prompts: 16 to read what the model writes."
        )
        return Verdict("Worked", "chosen answers win on pairs that were held out", why, look)
    if found.known and found.accuracy + found.known / found.pairs > 0.5 + found.doubt:
        return Verdict(
            "Unclear", "the evaluation is not held out", why, "Give eval_data pairs that are not in train_data."
        )
    if better:
        if found.best["step"] == 0:
            return Verdict(
                "Failed",
                "training made the model worse on pairs that were held out",
                why,
                f"{_learning_rate(summary, 0.1)}Check that both files were labelled by the same rule.",
            )
        word = "Unclear" if found.wins else "Failed"
        return Verdict(
            word,
            f"the model was better at step {found.best['step']:,} than at the end",
            f"{why} {_best_of(found)}",
            better,
        )
    if found.accuracy < 0.5 - found.doubt and summary["initial_loss"] is not None:
        return Verdict(
            "Failed",
            "rejected answers win on pairs that were held out",
            why,
            DIAGNOSES["pairs_swapped"].remedy,
        )
    if found.wins:
        return Verdict(
            "Unclear",
            "chosen answers win more often, but the loss did not fall",
            why,
            f"{_learning_rate(summary, 0.3)}The model is too confident on the pairs that it gets wrong; a larger beta helps too.",
        )
    if not found.fell and (summary.get("best_step") or math.inf) < summary.get("steps", 0):
        return Verdict(
            "Unclear",
            "no evaluation was clearly better than the model before training",
            f"{why} These are the weights of step {summary['best_step']:,}; later ones were worse.",
            "Read twenty pairs: is the preference visible in the text? Check that both files were labelled by the same rule.",
        )
    if not found.fell and abs(found.loss - found.start) < found.tolerance * abs(found.start):
        if summary["steps"] < FEW_STEPS:
            remedy = f"Take more steps first: this run took {summary['steps']:,}. Give more pairs, or set num_train_epochs: 3."
        else:
            remedy = f"{_learning_rate(summary, 10)}Or take more steps: this run took {summary['steps']:,}."
        return Verdict("Unclear", "the model has hardly moved", why, remedy)
    return Verdict("Unclear", "the evaluation does not differ from guessing", why, _more_pairs(found))


def _not_evaluated(summary: dict[str, Any]) -> Verdict:
    first, last = summary["first"].get("loss"), summary["last"].get("loss")
    why = "The figures are of training pairs, which a model can learn by heart."
    if first is not None and last is not None:
        why = f"The training loss went from {figure(first)} to {figure(last)}. {why}"
    given = any(name.startswith("eval_dataset") for name in summary["pairs"])
    if not given:
        return Verdict(
            "Unclear",
            "nothing was held out",
            why,
            "Give eval_data, pairs that are not in train_data, or set val_split: 0.1.",
        )
    if not summary.get("finished", True):
        return Verdict("Unclear", "no evaluation after the first step yet", why, "Wait for the next evaluation.")
    if (ended := _ended_early(summary)) and summary.get("settings", {}).get("eval_strategy") != "no":
        what = f"the run {ended}, before it was evaluated"
        return Verdict("Unclear", what, why, "Diagnoses that stop a run (stop_on) stand below.")
    return Verdict(
        "Unclear",
        "the run was not evaluated after its first step",
        why,
        "Set eval_strategy: steps.",
    )


def holds(event: dict[str, Any], summary: dict[str, Any], found: Figures | None) -> bool:
    """Whether a diagnosis of the run still agrees with the figures at its end."""
    name = event.get("name", "")
    if name not in DIAGNOSES or name in ("not_finite", "weights_zero"):
        return True
    last = found.final if found else summary["last"]
    limits = Limits.of(summary["changed_settings"].get("diagnostics"))
    start = summary["initial_loss"] if found is None else found.start
    loss = number(last.get("loss"))
    fell = found.fell if found else loss < number(start) * (1 - limits.stuck_tolerance)
    wins = found is not None and found.wins and fell
    if name == "learning_rate_high":
        return number(last.get("kl")) > limits.kl_level or not fell
    if name == "kl_exploding":
        return not number(last.get("kl")) < limits.kl_level / 5
    if name == "displacement":
        return not number(last.get("logratios/chosen")) > -limits.displacement
    if name == "pairs_swapped":
        accuracy = found.accuracy + found.doubt if found else number(last.get("rewards/accuracies"))
        return not accuracy > 0.5
    if DIAGNOSES[name].stuck:
        return not (fell or wins)
    if name == "overfitting":
        return found is None or found.was_better or not wins
    return not (DIAGNOSES[name].fails and wins)


def by_cause(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events in the order of DIAGNOSES, in which causes come before their consequences."""
    order = {name: place for place, name in enumerate(DIAGNOSES)}
    return sorted(events, key=lambda event: order.get(event.get("name", ""), len(order)))


def grouped(events: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every event without a cause among the events, with its consequences."""
    ordered = by_cause(events)
    names = {event.get("name", "") for event in ordered}
    roots: dict[str, str] = {}
    for event in ordered:
        name = event.get("name", "")
        causes = DIAGNOSES[name].causes if name in DIAGNOSES else ()
        cause = next((cause for cause in causes if cause in names), None)
        roots[name] = roots.get(cause, cause) if cause is not None else name
    return [
        (
            event,
            [
                other
                for other in ordered
                if other is not event and roots[other.get("name", "")] == event.get("name", "")
            ],
        )
        for event in ordered
        if roots[event.get("name", "")] == event.get("name", "")
    ]


def _best_of(found: Figures) -> str:
    rise, error = found.final.get("loss_since_best"), found.final.get("loss_since_best_se")
    said = f"At step {found.best['step']:,} it was {figure(found.best['loss'])}"
    return (
        f"{said}, and it has risen by {with_error(rise, error)} since, pair by pair."
        if rise is not None
        else f"{said}."
    )


def _better(summary: dict[str, Any], found: Figures) -> str:
    """Advice how to get the model of the best evaluation."""
    step = found.best["step"]
    if (name := f"checkpoint-{step}") in summary.get("checkpoints", ()):
        return f"Use {name}, which is in the run's folder, or set load_best_model_at_end: true."
    return f"Set load_best_model_at_end: true, which keeps the best checkpoint, or max_steps: {step}."


def _learning_rate(summary: dict[str, Any], factor: float) -> str:
    rate = summary.get("settings", {}).get("learning_rate")
    if not rate or not summary.get("finished", True):
        return ""  # an unfinished run may still move
    return f"Set learning_rate: {rate * factor:.4g} (this run's was {rate:g}). "


def _more_pairs(found: Figures) -> str:
    lead = abs(found.accuracy - 0.5)
    least = 0.5 + found.doubt
    pairs = f"{found.pairs:,} pair{'s' * (found.pairs != 1)}"
    said = f"With {pairs}, only an accuracy above {least:.0%} differs from guessing" if least < 1 else ""
    said = said or f"{pairs} {'are' if found.pairs != 1 else 'is'} too few: no accuracy would differ from guessing"
    if lead < 0.02:
        return f"{said}. Train longer, or read twenty pairs: is the preference visible in the text?"
    enough = math.ceil((math.sqrt(1 + 2 * lead) - 1) ** -2)  # the number of pairs at which `doubt` equals the lead
    return f"{said}. An accuracy of {found.accuracy:.0%} needs about {enough:,} pairs. Hold out more pairs."


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]
