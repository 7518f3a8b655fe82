"""What goes into a deployed model and what comes out: named tensors with axes and units, a budget, masks and state."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["float32", "float64", "int8", "uint8", "int16", "int32", "int64", "float16", "bool"]


class TensorSpec(BaseModel):
    """One named tensor of a model, described per sample: the batch axis is not part of `shape`.

    `axes` names each axis of `shape` (`("ssb_beam",)`), `unit` is the field's ("dBm", "probability", "1").
    A scalar per sample has empty `axes` and `shape`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    unit: str
    dtype: DType = "float32"

    @model_validator(mode="after")
    def _axes_match_shape(self) -> "TensorSpec":
        if len(self.axes) != len(self.shape):
            raise ValueError(f"tensor {self.name}: {len(self.axes)} axis names for {len(self.shape)} axes")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"tensor {self.name}: shape {self.shape} has an empty axis")
        return self

    @property
    def elements(self) -> int:
        """Number of values in one sample."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class ModelSignature(BaseModel):
    """One deployable model: its tensors in call order, its time budget, its masks and its carried state.

    `masks` maps an input to the input that says which of its values were reported (1) or are missing (0).
    `state` maps an input to the output that is fed back into it at the next call (a GRU's hidden vector); both have
    the same shape and dtype, and the state starts at zero.
    `budget_us` is the time one call may take; `slot_us` is how often a DU calls it (500 us: one slot at 30 kHz
    subcarrier spacing, TS 38.211 clause 4.3.2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    budget_us: float = Field(gt=0)
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    masks: dict[str, str] = {}
    state: dict[str, str] = {}
    slot_us: float = Field(default=500.0, gt=0)

    @model_validator(mode="after")
    def _names_fit(self) -> "ModelSignature":
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise ValueError(f"model {self.name}: tensor names repeat: {sorted(names)}")
        inputs = {spec.name: spec for spec in self.inputs}
        outputs = {spec.name: spec for spec in self.outputs}
        for masked, mask in self.masks.items():
            if masked not in inputs or mask not in inputs:
                raise ValueError(f"model {self.name}: mask {mask} of {masked} names an unknown input")
        for before, after in self.state.items():
            if before not in inputs or after not in outputs:
                raise ValueError(f"model {self.name}: state {before} -> {after} names an unknown tensor")
            if (inputs[before].shape, inputs[before].dtype) != (outputs[after].shape, outputs[after].dtype):
                raise ValueError(f"model {self.name}: state {before} -> {after} changes shape or dtype")
        return self

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs in call order."""
        return [spec.name for spec in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs in call order."""
        return [spec.name for spec in self.outputs]

    @property
    def decision(self) -> TensorSpec:
        """The first output that is not carried state: the one whose argmax parity compares."""
        carried = set(self.state.values())
        return next((spec for spec in self.outputs if spec.name not in carried), self.outputs[0])
