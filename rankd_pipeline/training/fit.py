"""The one training loop: Adam, warm-up and cosine, early stopping, and a resume that ends in the same bits.

Everything random is keyed, nothing is carried: the order of the rows by (seed, epoch), and whatever the loss
draws (dropout, augmentation, masking) by (seed, step), because PyTorch's global generator is re-seeded before
every step. So a checkpoint holds no generator state, and a fit killed in the middle of an epoch goes on with the
very numbers that it would have drawn.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rankd_pipeline.errors import RankdError
from rankd_pipeline.training.seeds import derive_seed
from rankd_pipeline.training.weights import read_tensors, save_tensors

LossFunction = Callable[[nn.Module, dict[str, Tensor]], Tensor]

_CHECKPOINT = "checkpoint.safetensors"


class FitConfig(BaseModel):
    """Settings of one fit; a part of the recipe, so every field that shapes the result is here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(ge=1, description="passes over the training rows, at most")
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0, description="peak learning rate of Adam")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled (AdamW), on matrices only")
    warmup_share: float = Field(default=0.05, ge=0, le=1, description="share of all steps with rising lr")
    final_lr_share: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, over the peak")
    patience: int = Field(default=0, ge=0, description="epochs without a better validation; 0: never stop early")
    validate_every: int = Field(default=1, ge=1, description="epochs between validations; the last one always")
    clip_norm: float = Field(default=0.0, ge=0, description="largest gradient norm; 0: no clipping")
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="validate and keep an exponential average of the weights; 0: off")
    threads: int = Field(default=1, ge=1, description="torch threads; two on two busy cores collapse (latency.md)")
    device: str = Field(default="cpu", pattern="^(cpu|cuda|auto)$")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: the loss under autocast; weights stay fp32")
    compile: bool = Field(default=False, description="torch.compile of each repeated block (members of a ModuleList)")
    columns_on: Literal["device", "host"] = Field(default="device", description="host: batches travel, for data beyond the GPU")
    checkpoint_seconds: float = Field(default=5.0, ge=0, description="least time between checkpoints")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch as it went; deterministic, so it may be stored in an artifact."""

    epoch: int
    """1-based."""
    epochs: int
    train_loss: float
    validation: float | None
    """None where `validate_every` skipped it."""
    best: float
    lr: float


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with. `samples_per_s` is a measurement of this process, the rest is deterministic."""

    best_epoch: int
    best_value: float
    history: tuple[EpochRecord, ...]
    steps: int
    samples_per_s: float


@dataclass
class _Progress:
    """Where a fit stands, as a checkpoint's JSON stores it."""

    step: int = 0
    step_in_epoch: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_value: float = math.inf
    finished: bool = False


def fit(
    model: nn.Module,
    train: Mapping[str, np.ndarray | Tensor],
    loss: LossFunction,
    validate: Callable[[nn.Module], float],
    cfg: FitConfig,
    seed: int,
    work: Path,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    groups: np.ndarray | None = None,
    before_epoch: Callable[[Sequence[EpochRecord]], None] | None = None,
) -> FitResult:
    """Train `model` in place and leave it in eval mode, on the CPU, holding the weights of the best validation.

    Args:
        model: its parameters with `requires_grad` are trained.
        train: columns of equal first dimension (rows); may be memory-mapped.
        loss: (model, batch of the same columns) → scalar to minimise; what it draws from torch's global generator
            is reproducible. On `device: cuda` it must draw on the batch's device.
        validate: lower is better; called in eval mode without gradients.
        seed: derives row order and draws; the initial weights are the caller's.
        work: folder of the checkpoint. The same call with the same folder goes on where a killed one was, and
            ends with the same weights bit for bit; a checkpoint of another fit is ignored and overwritten.
        on_epoch: told each epoch once it is over (not again for epochs before a resume).
        groups: code [rows] of the group (of like shape) of each row; a batch is drawn within one group.
        before_epoch: told the records so far before an epoch, and again before the rest of one that a resume takes up;
            a loss that changes with them is a pure function of the fit's history, and so is the result.

    Raises:
        RankdError: no rows, columns of unequal length, or a loss or validation that is no longer finite.
    """
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    torch.set_num_threads(cfg.threads)
    try:
        run = _Fit(model, train, loss, validate, cfg, seed, Path(work), groups)
        return run.run(on_epoch, before_epoch)
    finally:
        model.cpu().eval()
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


class _Fit:
    """The state of one call of `fit`."""

    def __init__(self, model, train, loss, validate, cfg: FitConfig, seed: int, work: Path, groups: np.ndarray | None) -> None:
        self.model, self.loss, self.validate, self.cfg, self.seed = model, loss, validate, cfg, seed
        self.columns = {name: as_tensor(value) for name, value in train.items()}
        self.rows = _common_length(self.columns)
        self.groups = _rows_by_group(groups, self.rows)
        self.steps_per_epoch = sum(math.ceil(len(rows) / cfg.batch_size) for rows in self.groups)
        self.path = work / _CHECKPOINT
        self.identity = _identity(model, self.columns, cfg, seed)
        self.device = _device(cfg.device)
        self.columns_on = self.device if cfg.columns_on == "device" else torch.device("cpu")
        self.columns = {name: value.to(self.columns_on) for name, value in self.columns.items()}
        model.to(self.device)
        if cfg.compile:
            _compile_blocks(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(model, cfg)
        self.average = [p.detach().clone() for p in self.parameters] if cfg.ema_decay else []
        self.best = _snapshot(model)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.progress = _Progress()
        self.history: list[EpochRecord] = []
        self.samples, self.train_seconds = 0, 0.0
        self.saved_at = time.monotonic()

    def run(
        self,
        on_epoch: Callable[[EpochRecord], None] | None,
        before_epoch: Callable[[Sequence[EpochRecord]], None] | None,
    ) -> FitResult:
        self._restore()
        while not self.progress.finished:
            if before_epoch is not None:
                before_epoch(self.history)
            self._train_epoch()
            record = self._close_epoch()
            if self.progress.finished or time.monotonic() - self.saved_at >= self.cfg.checkpoint_seconds:
                self._save()
            if on_epoch is not None:
                on_epoch(record)
        self.model.load_state_dict(self.best)
        return FitResult(
            best_epoch=self.progress.best_epoch,
            best_value=self.progress.best_value,
            history=tuple(self.history),
            steps=self.progress.step,
            samples_per_s=self.samples / self.train_seconds if self.train_seconds else 0.0,
        )

    def _train_epoch(self) -> None:
        """The hot loop: permuted index select from tensors in memory, one fused Adam step, no bookkeeping else."""
        cfg, progress, model, optimizer = self.cfg, self.progress, self.model, self.optimizer
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", progress.epoch))
        batches = _batches(self.groups, cfg.batch_size, generator)
        model.train()
        started = time.perf_counter()
        while progress.step_in_epoch < self.steps_per_epoch:
            rows = batches[progress.step_in_epoch].to(self.columns_on)
            batch = {name: column.index_select(0, rows).to(self.device) for name, column in self.columns.items()}
            _seed_step(derive_seed(self.seed, "step", progress.step), self.device)
            lr = _learning_rate(progress.step, cfg.epochs * self.steps_per_epoch, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with _autocast(cfg, self.device):
                value = self.loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if cfg.clip_norm:
                nn.utils.clip_grad_norm_(self.parameters, cfg.clip_norm)
            optimizer.step()
            self.loss_sum += value.detach()
            progress.step += 1
            progress.step_in_epoch += 1
            self.samples += len(rows)
            if cfg.ema_decay:
                # Early on, a shorter memory: the average must not hold on to the initial weights.
                decay = min(cfg.ema_decay, progress.step / (progress.step + 10.0))
                values = [p.detach() for p in self.parameters]
                torch._foreach_lerp_(self.average, values, 1.0 - decay)  # type: ignore[reportPrivateImportUsage]
            if time.monotonic() - self.saved_at >= cfg.checkpoint_seconds:
                self._save()
        self.train_seconds += time.perf_counter() - started

    def _close_epoch(self) -> EpochRecord:
        """Validate, remember the best weights, and decide whether to go on."""
        cfg, progress = self.cfg, self.progress
        progress.epoch += 1
        progress.step_in_epoch = 0
        train_loss = float(self.loss_sum) / self.steps_per_epoch
        self.loss_sum.zero_()
        if not math.isfinite(train_loss):
            raise RankdError(
                f"training diverged in epoch {progress.epoch}: the mean loss is {train_loss}; "
                f"lower the learning rate ({cfg.lr}) or look for bad values in the corpus"
            )
        value = None
        if progress.epoch % cfg.validate_every == 0 or progress.epoch == cfg.epochs:
            value = self._validated()
            if value < progress.best_value:
                progress.best_value, progress.best_epoch = value, progress.epoch
        since_best = progress.epoch - progress.best_epoch
        progress.finished = progress.epoch >= cfg.epochs or bool(cfg.patience and since_best >= cfg.patience)
        lr = _learning_rate(progress.step - 1, cfg.epochs * self.steps_per_epoch, cfg)
        record = EpochRecord(progress.epoch, cfg.epochs, train_loss, value, progress.best_value, lr)
        self.history.append(record)
        return record

    def _validated(self) -> float:
        """The validation of the weights, or of their average; a better one is kept as `self.best`."""
        trained = [p.detach().clone() for p in self.parameters] if self.average else []
        _assign(self.parameters, self.average)
        self.model.eval()
        with torch.no_grad(), _autocast(self.cfg, self.device):
            value = float(self.validate(self.model))
        if not math.isfinite(value):
            raise RankdError(
                f"the validation of epoch {self.progress.epoch} is {value}, not a finite number; look for bad values in the corpus"
            )
        if value < self.progress.best_value:
            self.best = _snapshot(self.model)
        _assign(self.parameters, trained)
        return value

    def _save(self) -> None:
        """Write the whole state as one file: tensors as safetensors, the rest as JSON in its header."""
        tensors = {f"model/{name}": value for name, value in _snapshot(self.model).items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"average/{i}": value.cpu() for i, value in enumerate(self.average)}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{i}/{key}"] = value.detach().cpu().contiguous()
        tensors["loss_sum"] = self.loss_sum.cpu()
        # No infinity in JSON: before the first validation the best value is null.
        best = self.progress.best_value
        state = {
            "identity": self.identity,
            "progress": asdict(self.progress) | {"best_value": best if math.isfinite(best) else None},
            "history": [asdict(r) | {"best": r.best if math.isfinite(r.best) else None} for r in self.history],
        }
        save_tensors(tensors, self.path, {"state": json.dumps(state)})
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        """Take up the checkpoint of this very fit, if there is one; anything else is started over."""
        try:
            tensors, metadata = read_tensors(self.path)
            state = json.loads(metadata["state"])
        except (RankdError, KeyError, ValueError):
            return
        if state["identity"] != self.identity:
            return
        self.model.load_state_dict(_under(tensors, "model/"))
        self.best = _under(tensors, "best/")
        _assign(self.average, [tensors[f"average/{i}"] for i in range(len(self.average))])
        for i, parameter in enumerate(self.parameters):
            saved = _under(tensors, f"optimizer/{i}/")
            # Adam's step counter stays where the optimizer keeps it: on the device only when fused on CUDA.
            self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in saved.items()}
        self.loss_sum = tensors["loss_sum"].to(self.device)
        self.progress = _Progress(**_finite(state["progress"], "best_value"))
        self.history = [EpochRecord(**_finite(record, "best")) for record in state["history"]]


def _finite(record: dict[str, Any], key: str) -> dict[str, Any]:
    return record | {key: math.inf if record[key] is None else record[key]}


def as_tensor(value: np.ndarray | Tensor) -> Tensor:
    """An array as a tensor over the same memory, without a warning where it is read only."""
    if isinstance(value, Tensor):
        return value
    # A read-only array (Arrow, a memory map) is only ever read here; torch warns because it cannot know.
    if not value.flags.writeable:
        view = value.view()
        try:
            view.flags.writeable = True
        except ValueError:
            return torch.from_numpy(value.copy())
        value = view
    return torch.from_numpy(value)


def _common_length(columns: Mapping[str, Tensor]) -> int:
    lengths = {name: len(value) for name, value in columns.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise RankdError(f"training needs columns of one common length above zero, found {lengths or 'no columns'}")
    return next(iter(lengths.values()))


def _identity(model: nn.Module, columns: Mapping[str, Tensor], cfg: FitConfig, seed: int) -> str:
    """A digest of what makes two fits the same: settings, initial weights, and the data by a sample of its rows."""
    digest = hashlib.sha256(cfg.model_dump_json(exclude={"checkpoint_seconds"}).encode())
    digest.update(str(seed).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for name, value in sorted(columns.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        rows = value[:: max(1, len(value) // 1024)]
        digest.update(rows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise RankdError("device: cuda is asked for, but torch finds no CUDA device; set device: cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _rows_by_group(groups: np.ndarray | None, rows: int) -> list[Tensor]:
    """Row numbers of each group, in the order of the codes."""
    if groups is None:
        return [torch.arange(rows)]
    if len(groups) != rows:
        raise RankdError(f"training has {rows} rows, but groups of {len(groups)}")
    return [torch.from_numpy(np.flatnonzero(groups == code)) for code in np.unique(groups)]


def _batches(groups: list[Tensor], size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of an epoch's batches: each group in random order, then the batches of all groups in random order."""
    batches = [part for rows in groups for part in rows[torch.randperm(len(rows), generator=generator)].split(size)]
    if len(groups) == 1:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def _autocast(cfg: FitConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")


def _compile_blocks(model: nn.Module) -> None:
    """Compile the members of each ModuleList in place: alike blocks share one compilation, names of weights stay."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(dynamic=True)


def _optimizer(model: nn.Module, cfg: FitConfig) -> torch.optim.Optimizer:
    """Fused AdamW; biases, norms and other vectors are not decayed, nor modules that say `no_weight_decay`."""
    spared = {id(p) for module in model.modules() if getattr(module, "no_weight_decay", False) for p in module.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in spared]
    rest = [p for p in parameters if p.ndim < 2 or id(p) in spared]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, fused=True)


def _learning_rate(step: int, steps: int, cfg: FitConfig) -> float:
    """Linear warm-up to `lr`, then a half cosine to `final_lr_share` of it at the last step."""
    warmup = int(cfg.warmup_share * steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return cfg.lr * (cfg.final_lr_share + (1 - cfg.final_lr_share) * 0.5 * (1 + math.cos(math.pi * share)))


def _seed_step(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _assign(targets: list[Any], values: list[Tensor]) -> None:
    """Copy `values` into `targets`; nothing where there is no average to copy."""
    with torch.no_grad():
        for target, value in zip(targets, values, strict=False):
            target.copy_(value)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
