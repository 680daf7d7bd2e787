"""Realistic faults in the sources, each with the test that must catch it. test_planted_faults.py plants them.

tests/test_the_tests.py plants faults in a gradient to test the gradient check. The faults here are in the sources, so they
also test the choice of cases: a fault in code that no case reaches is not caught.

The old texts are short formulas that seldom change. Each must occur exactly once in its file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One wrong edit.

    Attributes:
        file: path in the repository.
        old, new: the text and its replacement.
        wrong: the effect of the fault.
        test: pytest arguments that select the test which must fail.
        always: whether a test that always runs plants the fault; otherwise a slow test does. With `always`, `test` has no
            -k, because one process runs the tests of all these faults without a fault.
    """

    name: str
    file: str
    old: str
    new: str
    wrong: str
    test: tuple[str, ...]
    always: bool = False


_TABLE = "tests/test_operators.py::test_loss_and_gradient_equal_the_float64_reference"
_STATISTICS = "tests/test_operators.py::test_statistics_and_logps_equal_the_float64_reference"
_TRITON_TILE = "tests/test_triton_kernels.py::test_compiled_tile_size_agrees_and_keeps_every_label_place"
_LINEAR_ROWS = "tests/test_linear.py::test_loss_and_gradient_rows_equal_the_float64_reference"
_OBJECTIVE = "tests/test_objectives.py::test_value_is_the_papers_formula"
_EMULATED_TABLE = "tests/test_cuda_emulator.py::test_operator_table"
_PROPERTIES = "tests/properties/test_properties.py"

FAULTS = (
    # --- the C++ kernels of the CPU ---
    Fault(
        "smoothing_sign",
        "csrc/common/sigmoid_family.h",
        "-(1.0 - e) * sigmoid(-x) + e * sigmoid(x);",
        "-(1.0 - e) * sigmoid(-x) - e * sigmoid(x);",
        "label smoothing has the wrong sign in the derivative",
        (_TABLE, "-k", "cpu and label_smoothing"),
    ),
    Fault(
        "rejected_sign",
        "csrc/cpu/preference_loss.cpp",
        "p.coef[sides[1]] = -beta * out.slope;",
        "p.coef[sides[1]] = beta * out.slope;",
        "the rejected answer is learnt like the chosen one",
        (_TABLE, "-k", "cpu and float32"),
    ),
    Fault(
        "token_weight_dropped",
        "csrc/cpu/preference_loss.cpp",
        "sum += weights[t] * values[t];",
        "sum += values[t];",
        "sums leave the tokens' weights out",
        (_TABLE, "-k", "cpu and weights_everywhere"),
    ),
    Fault(
        "sum_in_float32",
        "csrc/cpu/preference_loss.cpp",
        "double sum = 0.0;",
        "float sum = 0.0f;",
        "sequence sums are accumulated in float32",
        ("tests/test_numerics.py::test_sums_beat_bfloat16_and_float32_accumulation", "-k", "cpu"),
    ),
    Fault(
        "entropy_origin",
        "csrc/common/online_softmax.h",
        "factor * (state.shifted + delta * state.sum)",
        "factor * state.shifted",
        "a new maximum rescales the entropy's moment without moving its origin",
        (_STATISTICS, "-k", "cpu"),
    ),
    Fault(
        "last_entry_unwritten",
        "csrc/cpu/logits_grad.cpp",
        "std::copy(tail, tail + (n - i), to + i);",
        "std::copy(tail, tail + (n - i - 1), to + i);",
        "the last entry of a row that ends within a vector is not written",
        (_TABLE, "-k", "cpu and odd_vocab"),
    ),
    Fault(
        "label_without_softcap",
        "csrc/cpu/logits_grad.cpp",
        "slope *= 1.0 - t * t;",
        "slope *= 1.0;",
        "the label's entry leaves out the softcap's derivative",
        (_TABLE, "-k", "cpu and scale_and_softcap"),
    ),
    Fault(
        "block_end_skipped",
        "csrc/cpu/token_logps.cpp",
        "for (; i < n; i += 2 * lanes) add(a, i);",
        "for (; i + 2 * lanes <= n; i += 2 * lanes) add(a, i);",
        "the end of a block is left out of the sum of exponentials",
        (_TABLE, "-k", "cpu and odd_vocab"),
    ),
    # --- Triton ---
    Fault(
        "coefficient_without_beta",
        "dpo_kernels/backends/triton/preference_loss.py",
        "tl.store(coef + rejected, -(b * slope))",
        "tl.store(coef + rejected, -slope)",
        "the rejected answer's coefficient lacks beta",
        ("tests/test_triton_kernels.py::test_preference_loss_equals_its_formulas",),
        always=True,
    ),
    Fault(
        "robust_without_divisor",
        "dpo_kernels/backends/triton/preference_loss.py",
        "e = -e / (1.0 - 2.0 * e)",
        "e = -e",
        "the robust loss is not divided by 1 - 2 e",
        ("tests/test_triton_kernels.py::test_preference_loss_equals_its_formulas",),
    ),
    Fault(
        "sum_not_rescaled",
        "dpo_kernels/backends/triton/token_logps.py",
        "s = rescale * s + lane_sum(e)",
        "s = s + lane_sum(e)",
        "the sum of exponentials is not rescaled to a new maximum",
        (_TRITON_TILE,),
    ),
    Fault(
        "tile_not_masked",
        "dpo_kernels/backends/triton/token_logps.py",
        "keep = (column < groups * GROUP) & (column != label)",
        "keep = column != label",
        "what lies behind the end of a row joins its sum",
        (_TRITON_TILE,),
    ),
    Fault(
        "label_tile_twice",
        "dpo_kernels/backends/triton/logits_grad.py",
        "index + (index >= label_tile).to(tl.int32)",
        "index + (index > label_tile).to(tl.int32)",
        "the label's tile is written again, without the label, and the next one never",
        (_TRITON_TILE,),
    ),
    Fault(
        "forward_kl_without_p",
        "dpo_kernels/backends/triton/logits_grad.py",
        "by_p += by_forward",
        "by_p += 0.0 * by_forward",
        "the gradient of KL(reference || policy) lacks the policy's term",
        ("tests/test_objectives_kl.py::test_the_stage_equals_the_float64_truth", "-k", "triton and float32"),
    ),
    # --- CUDA, on the emulator ---
    Fault(
        "barrier_removed",
        "csrc/cuda/preference_loss.cu",
        "__syncthreads();  // the next tokens add to the same sums",
        "// the next tokens add to the same sums",
        "two threads add to one sum at the same time",
        (
            "tests/test_cuda_emulator.py::test_sums_do_not_see_padding",
            "tests/test_cuda_emulator.py::test_the_sum_of_a_long_sequence_does_not_see_padding",
            "tests/test_cuda_emulator.py::test_preference_loss_against_float64",
        ),
    ),
    Fault(
        "pair_weight_dropped_in_backward",
        "csrc/cuda/logits_grad.cu",
        "if (s.pair_weights != nullptr) grad *= s.pair_weights[pair];",
        "",
        "the gradient leaves the pairs' weights out",
        (_EMULATED_TABLE, "-k", "weights_everywhere"),
    ),
    Fault(
        "kl_not_rescaled",
        "csrc/cuda/token_logps.cuh",
        "if constexpr (Tr::kKl) s.drift[k] *= factor;",
        "",
        "the KL's moment is not rescaled to a new maximum",
        (_EMULATED_TABLE, "-k", "float32 or two_blocks_exactly or confident"),
    ),
    # --- eager, operators, linear path, planner ---
    Fault(
        "sides_swapped",
        "dpo_kernels/backends/eager.py",
        "torch.cat([beta * slope, -beta * slope])",
        "torch.cat([-beta * slope, beta * slope])",
        "chosen and rejected are exchanged in the gradient",
        (f"{_TABLE}[eager-float32]",),
        always=True,
    ),
    Fault(
        "owner_off_by_one",
        "dpo_kernels/stages.py",
        "cu_seqlens, right=True) - 1",
        "cu_seqlens, right=False) - 1",
        "the first token of a packed sequence belongs to the one before",
        (_TABLE, "-k", "eager and packed"),
    ),
    Fault(
        "one_per_cent_too_much",
        "dpo_kernels/backends/whole_call.py",
        "spread(coef * grad.repeat(2), weights",
        "spread(1.01 * coef * grad.repeat(2), weights",
        "all gradients are 1 % too large",
        (f"{_PROPERTIES}::test_dpo_loss[eager-always-usual]",),
    ),
    Fault(
        "bias_of_the_last_chunk",
        "dpo_kernels/linear/chunk.py",
        "self.bias += dz.sum(0, dtype=self.dtype)",
        "self.bias = dz.sum(0, dtype=self.dtype)",
        "the bias's gradient is the last chunk's alone",
        (_LINEAR_ROWS,),
    ),
    Fault(
        "head_of_the_last_chunk",
        "dpo_kernels/linear/chunk.py",
        "self.weight, add=self.started)",
        "self.weight, add=False)",
        "the head's gradient is the last chunk's alone",
        (_LINEAR_ROWS,),
    ),
    Fault(
        "mean_as_sum",
        "dpo_kernels/linear/pairs.py",
        'scale = 1 / max(pairs, 1) if settings.reduction == "mean" else 1.0',
        "scale = 1.0",
        "gradients of the mean are those of the sum",
        (_LINEAR_ROWS,),
    ),
    Fault(
        "token_between_chunks",
        "dpo_kernels/linear/planner.py",
        "bounds = (*_cut(begin, end - rows, rows), end)",
        "bounds = (*_cut(begin, end - rows - 1, rows), end)",
        "a pair beyond the budget gets a chunk of one token more than fits",
        ("tests/test_planner.py::test_pair_plans_cover_each_token_once_within_the_budget",),
        always=True,
    ),
    Fault(
        "kl_sign",
        "dpo_kernels/pair_loss.py",
        "losses, weighted = losses + shares, weighted + shares",
        "losses, weighted = losses - shares, weighted - shares",
        "the KL term drives the policy away from the reference",
        ("tests/test_objectives_kl.py::test_loss_and_gradient_equal_the_float64_reference",),
    ),
    # --- objectives ---
    Fault(
        "smoothing_adds",
        "dpo_kernels/objectives/formulas.py",
        "return -(1 - e) * F.logsigmoid(x) - torch.where",
        "return -(1 - e) * F.logsigmoid(x) + torch.where",
        "the smoothed part of the loss has the wrong sign",
        (_OBJECTIVE,),
        always=True,
    ),
    Fault(
        "empty_answer_divides",
        "dpo_kernels/objectives/formulas.py",
        "return sums / torch.where(lengths > 0, lengths, torch.ones_like(lengths))",
        "return sums / lengths",
        "an answer without tokens makes a mean NaN",
        ("tests/test_objectives.py::test_an_empty_completion_gives_no_nan",),
    ),
    Fault(
        "penalty_sign",
        "dpo_kernels/objectives/formulas.py",
        "penalty * F.relu(-pairs.chosen_logratios)",
        "penalty * F.relu(pairs.chosen_logratios)",
        "DPO-Positive punishes chosen answers that the policy likes more than the reference does",
        (_OBJECTIVE, "-k", "dpop"),
    ),
    Fault(
        "gradient_not_stopped",
        "dpo_kernels/objectives/formulas.py",
        "chosen_kl.detach()",
        "chosen_kl",
        "TDPO2's gradient widens the chosen answer's KL",
        (f"{_PROPERTIES}::test_dpo_loss_of_every_objective[eager-always-tdpo2]",),
    ),
    # --- the trainer ---
    Fault(
        "pair_weights_dropped",
        "python/dpo_trainer/loss_trainer.py",
        '"pair_weights": pair_weights,',
        '"pair_weights": None,',
        "pairs' weights, and with them the divisor of a step, are left out",
        (
            "tests/trainer/test_trainer.py::test_loss_and_every_gradient_equal_plain_pytorch",
            "-k",
            "llama-tied and padded",
        ),
    ),
    Fault(
        "pair_weights_averaged",
        "python/dpo_trainer/loss_trainer.py",
        '"pair_weights": pair_weights,',
        '"pair_weights": pair_weights.mean() if len(pair_weights) else pair_weights,',
        "all pairs of a batch weigh the same",
        ("tests/trainer/test_trainer.py::test_accumulated_micro_batches_equal_one_batch",),
    ),
    Fault(
        "labels_shifted",
        "python/dpo_trainer/batch/collator.py",
        "before = torch.arange(start - 1, start - 1 + len(tokens))",
        "before = torch.arange(start, start + len(tokens))",
        "every token is scored by the logits that have already seen it",
        ("tests/trainer/test_layout.py", "-k", "what_is_scored or log_probs_of_sequences_alone"),
    ),
    Fault(
        "reference_with_adapter",
        "python/dpo_trainer/model/references.py",
        "with evaluating(model), model.disable_adapter():",
        "with evaluating(model):",
        "the reference is the policy, adapter and all",
        ("tests/trainer/test_model.py::test_adapter_off_is_the_base_model",),
    ),
    Fault(
        "mean_of_means",
        "python/dpo_trainer/loss_trainer.py",
        "share = weights * (self.accelerator.num_processes / num_items_in_batch)",
        "share = weights / weights.sum()",
        "accumulated batches are divided by their own weights instead of the step's",
        ("tests/trainer/test_trainer.py::test_accumulated_micro_batches_equal_one_batch",),
    ),
    Fault(
        "dropout_left_on",
        "python/dpo_trainer/model/dropout.py",
        "setattr(module, name, 0.0)",
        "pass",
        "dropout stays on, in the reference too, and the first loss is not log 2",
        ("tests/trainer/test_model.py::test_dropout_is_disabled_everywhere",),
        always=True,
    ),
    Fault(
        "reference_without_trained_adapter",
        "python/dpo_trainer/reference_trainer.py",
        "without = (self.attached.is_new and self.attached.keeps_base) or neutral",
        "without = True",
        "a model that brings a trained adapter is compared with its bare base",
        ("tests/trainer/test_adapter_references.py", "-k", "a_trained_adapter_is_continued or rewrites_the_base"),
    ),
    Fault(
        "reference_shares_what_trains",
        "python/dpo_trainer/model/references.py",
        "frozen = [value for value in model.parameters() if not value.requires_grad] if shared else []",
        "frozen = list(model.parameters())",
        "the frozen copy shares the weights that train, so the reference moves with the policy",
        ("tests/trainer/test_adapter_references.py", "-k", "a_trained_adapter_is_continued or stands_still"),
    ),
    Fault(
        "virtual_tokens_scored",
        "python/dpo_trainer/model/split.py",
        "return logits[:, -length:] if self.around and logits is not None else logits",
        "return logits[:, :length] if self.around and logits is not None else logits",
        "every token is scored where an adapter's virtual tokens stand before it",
        ("tests/trainer/test_adapters.py", "-k", "plain_forwards and PROMPT_TUNING and padded and not MULTI"),
    ),
    Fault(
        "auxiliary_loss_dropped",
        "python/dpo_trainer/loss_trainer.py",
        "output.loss = output.loss + self.auxiliary.factor * pair_weights.sum() * auxiliary",
        "output.loss = output.loss + 0.0 * auxiliary",
        "the auxiliary loss of a mixture of experts is logged and not added",
        ("tests/trainer/test_experts.py",),
    ),
    Fault(
        "users_words_scored",
        "python/dpo_trainer/batch/collator.py",
        "if mask is not None and not all(mask):",
        "if False:",
        "what users and tools say within a completion is trained on",
        ("tests/trainer/test_chat_templates.py",),
    ),
)
