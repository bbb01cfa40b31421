"""The loss of single tokens under a causal language model: the only place where labels are shifted.

Shapes: B rows, T positions (right-padded), N target tokens, D hidden size, V vocabulary.

The body runs once over the padded batch without an attention mask: with right padding and causal attention no real
token sees padding. Only the hidden states that predict a target reach the head, in chunks, so that full logits
never exist. Logits and their logsumexp are float32 whatever the model's dtype: in bfloat16 a loss is off by 0.03 to
0.06 nats, and the cut at a ratio of 0.6 lies within 0.001 nats (arXiv 2502.01968, figures).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenclean_ray.errors import UserError, why
from tokenclean_ray.kernels import losses_of

# logits at a time: 32 MB of float32, near the caches; blocks of the vocabulary that fit a core's own gain 0 to 4 %
CPU_CHUNK_LOGITS = 1 << 23
GPU_CHUNK_LOGITS = 1 << 28  # 1 GB
LEAST_CHUNK = 256  # positions: a head of 128,000 tokens is 1.4 times as fast with 256 of them as with 64
NOTHING_BT = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)  # a batch without a target
# nats, in the mean: a batch of another shape rounds otherwise, single tokens by half a nat and more in bfloat16,
# where an expert flips by more still; a model that padding changes is off by one or several nats
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.4, torch.float16: 0.1}


class TokenLoss(nn.Module):
    """Per-token losses of one model. Built by `token_loss_for`, which compares it to the model's own logits.

    A module, so that sharding and its gathers wrap body and head alike.
    """

    def __init__(self, model: Any, full_logits: bool = False) -> None:
        """`full_logits`: use the model's own logits, for models whose head is more than a matrix; slower, larger."""
        super().__init__()
        self.model = model
        adapted = hasattr(model.get_output_embeddings(), "base_layer")  # by peft: its weight is without the adapter
        self.full_logits = full_logits or adapted or _body_of(model) is model
        config = model.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        self._scale = 1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)

    def forward(self, ids_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Losses of the target tokens, in row-major order.

        Args:
            ids_BT: token ids, right-padded with any valid id, int64.
            target_BT: true for the tokens whose loss is wanted; column 0 must be false. On the CPU it may be, too.

        Returns:
            (N,) float32, nats: -log P(token t | tokens before t).
        """
        return self.statistics(ids_BT, target_BT)[0]

    def statistics(self, ids_BT: Tensor, target_BT: Tensor, more: tuple[str, ...] = ()) -> Tensor:
        """The losses, and what else is wanted of each prediction P(· | tokens before t), from the same pass.

        Args:
            ids_BT: as for `forward`.
            target_BT: as for `forward`.
            more: entropy (nats) or rank (how many tokens the model finds likelier than t).

        Returns:
            (1 + len(more), N) float32: the losses, then what was asked for, in its order.
        """
        # before the body is begun: a GPU is waited for, to know how many there are
        at_N = target_BT.flatten().nonzero()[:, 0].to(ids_BT.device)
        states_BTD = self._states(ids_BT)
        hidden_ND = states_BTD.flatten(0, 1)[at_N.to(states_BTD.device) - 1]
        labels_N = ids_BT.flatten()[at_N].to(states_BTD.device)
        most = CPU_CHUNK_LOGITS if hidden_ND.device.type == "cpu" else GPU_CHUNK_LOGITS
        chunk = max(1, most // self.model.config.get_text_config().vocab_size // LEAST_CHUNK) * LEAST_CHUNK
        chunks = zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True)
        return torch.cat([self._head(*piece, more) for piece in chunks], -1)

    def forget_lengths(self) -> None:
        """Reset dynamic RoPE, which keeps to the longest row so far, by a short one. Under FSDP all ranks must."""
        with torch.no_grad():
            self(*(nothing.to(self.device) for nothing in NOTHING_BT))

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    def _states(self, ids_BT: Tensor) -> Tensor:
        if self.full_logits:
            return self.model(input_ids=ids_BT, use_cache=False).logits
        return _body_of(self.model)(input_ids=ids_BT, use_cache=False).last_hidden_state

    def _head(self, hidden_nD: Tensor, labels_n: Tensor, more: tuple[str, ...]) -> Tensor:
        if not (torch.is_grad_enabled() and hidden_nD.requires_grad):
            return self._head_now(hidden_nD, labels_n, more)
        trained = any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters())
        if trained or more or self.full_logits:
            # logits of one chunk at a time in the backward pass too
            return checkpoint(self._head_now, hidden_nD, labels_n, more, use_reentrant=False)
        return _UnderFrozenHead.apply(hidden_nD, labels_n, self._head_now)

    def _head_now(self, hidden_nD: Tensor, labels_n: Tensor, more: tuple[str, ...]) -> Tensor:
        logits_nV = hidden_nD.float() if self.full_logits else self._logits(hidden_nD)
        labels_n = labels_n.to(logits_nV.device)  # a tied head lies where the embedding does, not with the last layer
        found = {}
        if "entropy" in more:
            found["entropy"] = torch.special.entr(torch.softmax(logits_nV, -1)).sum(-1)
        if "rank" in more:
            found["rank"] = (logits_nV > logits_nV.gather(-1, labels_n[:, None])).sum(-1).float()
        found["loss"] = losses_of(logits_nV, labels_n)  # the last, since it may overwrite the logits
        if "rank" in more:
            found["rank"] = found["rank"].where(~found["loss"].isnan(), torch.nan)  # nothing is greater than NaN
        return torch.stack([found[name] for name in ("loss", *more)])

    def _logits(self, hidden_nD: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        weight_VD, bias_V = head.weight, getattr(head, "bias", None)
        hidden_nD = hidden_nD.to(weight_VD.device)
        if weight_VD.dtype == torch.float32:
            logits_nV = hidden_nD.float() @ weight_VD.T
        elif torch.is_grad_enabled():
            logits_nV = (hidden_nD.to(weight_VD.dtype) @ weight_VD.T).float()  # training bears the rounding
        elif weight_VD.device.type == "cuda":
            logits_nV = torch.mm(hidden_nD.to(weight_VD.dtype), weight_VD.T, out_dtype=torch.float32)
        else:
            logits_nV = hidden_nD.float() @ weight_VD.float().T
        if bias_V is not None:
            logits_nV = logits_nV + bias_V.float()
        if self._scale != 1:
            logits_nV = logits_nV * self._scale
        return torch.tanh(logits_nV / self._softcap) * self._softcap if self._softcap else logits_nV


def _body_of(model: Any) -> Any:
    """All of a model but its head; the model itself where it has no such part."""
    body = model.base_model
    return getattr(model, "model", model) if body is model else body  # Llama 4's text models misname theirs


class _UnderFrozenHead(torch.autograd.Function):
    """Losses whose gradients are found beside them: logits are computed once, and gone before the backward pass.

    A loss depends on its own hidden state alone, so that the gradient of their sum holds each one's.
    """

    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, labels_n: Tensor, head: Any) -> Tensor:
        with torch.enable_grad():
            hidden_nD = hidden_nD.detach().requires_grad_()
            losses_1n = head(hidden_nD, labels_n, ())
            (gradients_nD,) = torch.autograd.grad(losses_1n.sum(), hidden_nD)
        ctx.save_for_backward(gradients_nD)
        return losses_1n.detach()

    @staticmethod
    def backward(ctx: Any, grad_1n: Tensor) -> tuple[Tensor, None, None]:
        (gradients_nD,) = ctx.saved_tensors
        return (grad_1n[0, :, None] * gradients_nD).to(gradients_nD.dtype), None, None


def token_loss_for(model: Any) -> TokenLoss:
    """The fastest way to a model's token losses that agrees with the model's own logits.

    A fixed batch of pseudo-random tokens is compared with each row alone through `model(...)`; so every actor
    decides alike. Full logits are used only where they are closer by more than the rounding of half precision, which
    they have in common with those rows.

    Raises:
        UserError: the model does not run on text alone, its losses are no numbers, or padding changes them, so that
            batches would be wrong.
    """
    ids_BT, target_BT, expected_N = _canary(model)
    if expected_N.isnan().any():
        raise UserError(f"model {model.name_or_path} gives NaN losses: check its weights, or set model.dtype: float32")
    candidates = TokenLoss(model), TokenLoss(model, full_logits=True)
    with torch.inference_mode():
        head, full = (
            (candidate(ids_BT, target_BT).to(expected_N.device) - expected_N).abs().mean().item()
            for candidate in candidates
        )
    tolerance = TOLERANCE[model.dtype]
    if min(head, full) > tolerance:
        raise UserError(
            f"model {model.name_or_path}: its losses in a padded batch differ from those of single rows by "
            f"{full:.3g} nats in the mean: {type(model).__name__} cannot be scored in batches"
        )
    return candidates[head > 2 * full + tolerance / 4]


def _canary(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 17, 24)
    ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    target_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    expected = []
    for row, length in enumerate(lengths):
        ids_BT[row, :length] = torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator)
        target_BT[row, 1:length] = True
        alone = ids_BT[row : row + 1, :length].to(device)
        try:
            with torch.inference_mode():
                logits_TV = model(input_ids=alone, use_cache=False).logits[0, :-1].float()
        except (TypeError, ValueError) as error:  # some want an image
            raise UserError(
                f"model {model.name_or_path}: {type(model).__name__} takes no text alone ({why(error)})"
            ) from error
        expected.append(
            torch.nn.functional.cross_entropy(logits_TV, alone[0, 1:].to(logits_TV.device), reduction="none")
        )
    return ids_BT.to(device), target_BT.to(device), torch.cat(expected)
