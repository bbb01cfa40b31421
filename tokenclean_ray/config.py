"""Every knob of a run.

One frozen, validated `Config`; `config_file` reads it. Imports neither torch nor Ray, so that a job fails on a typo
before it loads anything heavy.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from tokenclean_ray.errors import nearest


class Section(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _no_credentials(text: str) -> str:
    if re.match(r"(s3|gs|gcs|hf)://[^/]*@", text):
        raise ValueError("credentials in the URL of an object store have no effect: set them in the environment")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_no_credentials)]
Paths = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
KNOWN_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question", "answer"),
    *("system", "tools", "source"),
)
WRITTEN_COLUMNS = ("row", "source", "input_ids", "response_mask", "labels", "round")


class Data(Section):
    """What is read, and how a row becomes tokens."""

    path: Paths | None = None
    """Files, folders or globs (.jsonl .ndjson .json, also .gz and .zst; .parquet), or hf://datasets/owner/name."""
    warmup: Paths | None = None
    """A small clean set: what the first reference is trained on where no model.reference is given."""
    held_out: Paths | None = None
    """Clean rows for the guard; omitted: a share of the warm-up set, see evolve.held_out_share."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "question_answer"] = "auto"
    """auto: each row by the columns it has."""
    columns: dict[str, str] = {}
    """The expected column name → the input's own, e.g. {messages: conversations}."""
    turn_keys: dict[str, str | None] = {}
    """The same of the keys of turns, e.g. {content: text}; null: none, as {reasoning_content: null} takes that out of
    each turn before anything else sees it."""
    extra_columns: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Columns of the input to carry through to the masked dataset; `id` and `source` always are."""
    template: Literal["chat", "tulu"] = "chat"
    """The tokenizer's chat template, or the paper's Tulu format."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens."""
    on_overflow: Literal["truncate", "reject"] = "truncate"
    """What happens to a row longer than max_length."""
    max_rejected: float = Field(default=0.05, ge=0, le=1)
    """Share of rows; more than that ends the job."""
    part_bytes: int = Field(default=1 << 20, ge=1024)
    """Bytes of input to a part, the unit of work and of resume; the driver holds 3 kB for each. Changing it scores
    everything again."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in KNOWN_COLUMNS:
                hint = nearest(name, KNOWN_COLUMNS) or f"; known are {', '.join(KNOWN_COLUMNS)}"
                raise ValueError(f"{name} is not a column that a format expects{hint}")
        return columns

    @field_validator("extra_columns")
    @classmethod
    def _not_our_own(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        for name in columns:
            if name in WRITTEN_COLUMNS:
                raise ValueError(f"{name} is a column that is written in any case: leave it out, or rename the input's")
        return columns


class Model(Section):
    """The two models: folders or hub ids."""

    base: Text | None = None
    reference: Text | None = None
    """A model, or a LoRA adapter folder over the base; omitted: trained from data.warmup."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and the body; auto: float32 on a CPU, bfloat16 on a GPU. float16 moves losses an eighth as far as
    bfloat16, where activations stay below 65,504. Losses are float32 always. Training computes in bfloat16 where this
    is a half, and keeps what it trains in float32."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs where the cluster has one when the job starts. cpu or gpu: also on a cluster that has none yet and
    grows: actors and workers wait for the nodes that they ask for."""
    trust_remote_code: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = ()
    """The models, as they are named here or in train.model, whose own Python code may run; else no model's may."""

    def trusts(self, name: str) -> bool:
        """Whether a model's own code may run."""
        return name in self.trust_remote_code


def _in_order(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise ValueError("[min, max] wants min <= max")
    return pair


Count = Annotated[int, Field(ge=1)]
Size = Literal["auto"] | Count | Annotated[tuple[Count, Count], AfterValidator(_in_order)]


# engine arguments that other keys decide
VLLM_ELSEWHERE = {
    "model": "model.base and model.reference",
    "tokenizer": "model.base",
    "dtype": "model.dtype",
    "skip_tokenizer_init": "the token ids, which are all that the engine sees",
    "enable_prefix_caching": "prompt scores, which a cache would swallow",
    "enable_lora": "model.reference",
    "trust_remote_code": "model.trust_remote_code",
}
PICKLES = ("pt", "npcache")


class Score(Section):
    """How the losses are computed."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """vllm: for tensor parallelism, quantisation and long contexts; wants the extra [vllm] on every node."""
    vllm: dict[str, Any] = {}
    """Arguments of vLLM's engine over our own, e.g. {quantization: fp8}. No effect on the other backend."""
    batch_tokens: Count = 16384
    """Most tokens, padding included, of a forward pass. A CPU takes 2048 at most, for its caches; by vLLM 4096."""
    num_actors: Size = "auto"
    """auto: as many as the cluster has room for, but little work on CPUs is done by the driver before actors start;
    [min, max]: a pool that grows and shrinks."""
    gpus_per_actor: Count = 1
    """More than one: the model is spread over them. No effect where the cluster has no GPU."""
    cpus_per_actor: Count = 1
    """Threads of one actor where there is no GPU."""
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that may score, e.g. {ray.io/accelerator-type: H100}."""
    colocate: Literal["auto"] | bool = "auto"
    """true: one pool whose actors hold both models; false: one pass per model; auto: by their size."""

    @field_validator("vllm")
    @classmethod
    def _ours_elsewhere(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments.keys() & VLLM_ELSEWHERE.keys():
            raise ValueError(f"{name} follows from {VLLM_ELSEWHERE[name]}")
        if arguments.get("load_format") in PICKLES:
            raise ValueError("load_format: pickled weights are never loaded; convert them to safetensors")
        return arguments


Scorer = Literal[
    "excess_loss", "gated_excess_loss", "plausibility", "base_loss", "probability", "entropy", "random", "full"
]
WITHOUT_REFERENCE = ("base_loss", "probability", "entropy", "random", "full")
# field → the scorers that read it
OF_SCORER = {
    "gate": ("gated_excess_loss",),
    "gate_quantile": ("gated_excess_loss",),
    "gate_on": ("gated_excess_loss", "plausibility"),
    "strict": ("gated_excess_loss",),
    "above": ("probability",),
    "below": ("probability",),
    "seed": ("random",),
}


class Calibrate(Section):
    """Noise planted in copies of some rows, to see what the selection does to it. Copies are never published."""

    share: float = Field(default=0.01, gt=0, le=1)
    """Of the rows, drawn by a hash of seed, part and row."""
    replaced: float = Field(default=0.1, gt=0, lt=1)
    """Share of a copy's response tokens that are replaced: half by random tokens, half by other rows' tokens."""
    seed: Seed = 0


class Select(Section):
    """Which tokens are kept."""

    scorer: Scorer = "gated_excess_loss"
    """The paper's is excess_loss; why it is not the default: `tokenclean study` and the README."""
    scope: Literal["global", "sample", "source"] = "global"
    """Rank over all response tokens, within each row (RHO), or within each source."""
    keep_ratio: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of response tokens; an upper limit where a scorer rules tokens out. auto: the largest that keeps the
    estimated share of noise among kept tokens within max_noise, see `calibrate`."""
    max_noise: float = Field(default=0.02, gt=0, lt=1)
    """Of keep_ratio: auto."""
    calibrate: Calibrate | None = None
    """Plant noise in copies of some rows and report what becomes of it; keep_ratio: auto does so in any case."""
    seed: Seed = 0
    """Of the scorer random."""
    gate: Literal["auto"] | Annotated[float, Field(gt=0)] = 2.0
    """Of the scorer gated_excess_loss: gains count only where the reference's loss (nats) is below. auto: the
    gate_quantile of it over the clean held-out rows."""
    gate_quantile: float = Field(default=0.95, gt=0, lt=1)
    """Of gate: auto: the share of clean tokens that pass."""
    gate_on: Literal["loss", "surprise", "rank"] = "loss"
    """surprise: the reference's loss minus the entropy of its prediction; rank: how many tokens it finds likelier."""
    strict: bool = False
    """Tokens outside the gate are never kept."""
    above: float | None = Field(default=None, ge=0, lt=1)
    """Of the scorer probability: only tokens that the base gives more than this; omitted: no limit."""
    below: float | None = Field(default=None, gt=0, le=1)
    """Of the scorer probability: only tokens that the base gives less than this."""
    cut: Text | None = None
    """A folder selections/<name>, of this run or another: its cut is kept, and with it all else of this section."""
    warn_drift: float = Field(default=0.1, gt=0, le=1)
    """Kolmogorov-Smirnov distance of new rows' scores from the others', beyond which clean warns."""

    @property
    def ratio(self) -> float:
        """keep_ratio as a number; auto has been settled by then."""
        assert not isinstance(self.keep_ratio, str)
        return self.keep_ratio

    @model_validator(mode="after")
    def _of_this_scorer(self) -> "Select":
        for name, scorers in OF_SCORER.items():
            if self.scorer not in scorers and getattr(self, name) != Select.model_fields[name].default:
                raise ValueError(f"{name} has an effect only under scorer: {' or '.join(scorers)}, not {self.scorer}")
        if self.keep_ratio == "auto":
            if self.scope != "global" or self.scorer in ("random", "full"):
                raise ValueError("keep_ratio: auto wants scope: global and a scorer that reads losses")
        elif self.max_noise != Select.model_fields["max_noise"].default:
            raise ValueError("max_noise has an effect only under keep_ratio: auto")
        if self.scorer == "full" and self.keep_ratio != 1:
            raise ValueError("the scorer full keeps every token: set keep_ratio: 1")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError("above must be less than below, else no token is kept")
        return self


class Lora(Section):
    """Low-rank adaptation, merged into the model when training ends."""

    r: Count = 64
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = "all-linear"
    """Names of the linear layers, such as [q_proj, v_proj]; all-linear: every one but the head."""


class Train(Section):
    """Fine-tuning on masked tokens: AdamW without weight decay, linear warm-up and decay."""

    data: Text | None = None
    """A run folder (its newest snapshot), or a folder of Parquet files with input_ids and labels."""
    model: Text | None = None
    """What to start from; omitted: model.base."""
    num_workers: Size = "auto"
    """auto: one for each GPU, or one on a CPU; [min, max]: elastic."""
    label_selector: dict[str, str] = {}
    """Ray's labels of the nodes that may train, as in score; num_workers is a number then."""
    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the updates."""
    epochs: Count = 1
    batch_rows: Count = 48
    """Rows of an update, over all workers."""
    batch_tokens: Count = 16384
    """Most tokens of a worker's forward pass, padding included; 2048 at most on a CPU."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    activation_checkpointing: bool = True
    """Compute a layer's activations again in the backward pass: a third more work, a fraction of the memory."""
    checkpoint_every_steps: Count = 200
    tensorboard: bool = False
    """Also write the training curve to RUN/tensorboard."""


Plan = Literal["full", "random", "rho", "fixed", "self_evolving"]


def _each_once(plans: tuple[Plan, ...]) -> tuple[Plan, ...]:
    if twice := [plan for plan in plans if plans.count(plan) > 1]:
        raise ValueError(f"{twice[0]} is there twice")
    return plans


class Evolve(Section):
    """Rounds of cleaning and training."""

    num_subsets: Count = 5
    """The pool is split by a hash of the prompt. Without data.warmup and model.reference subset 0 is the warm-up."""
    plans: Annotated[tuple[Plan, ...], BeforeValidator(_as_tuple), Field(min_length=1), AfterValidator(_each_once)] = (
        "self_evolving",
    )
    """Run one after another over the same encoded rows and base losses, and compared; the last one's result is
    published."""
    guard: bool = True
    """Refuse a round that is worse on clean held-out rows."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the warm-up rows, where data.held_out is omitted."""


class Config(Section):
    """One run."""

    output: Text
    """The run folder: a local path, or s3://, gs:// …"""
    endpoint_url: Text | None = None
    """Where s3:// is, if not at Amazon, e.g. http://minio:9000. Keys come from the environment of every node."""
    seed: Seed = 0
    """Of splits, the order of training rows, adapters, dropout and the plan random."""
    data: Data = Data()
    model: Model = Model()
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    evolve: Evolve = Evolve()

    @model_validator(mode="before")
    @classmethod
    def _nothing_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A section whose keys are all commented out is None in YAML."""
        return {key: value for key, value in values.items() if value is not None or key not in SECTIONS}


_DEFAULTS = {name: field.default for name, field in Config.model_fields.items()}
SECTIONS = {name: type(default) for name, default in _DEFAULTS.items() if isinstance(default, Section)}
