"""What a channel prediction corpus is made of: the sets D1-s … D19-s, their crops, sample counts and noise."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.radio.waves import max_doppler_hz
from rankd_pipeline.ran_functions.contract import Shift

Scenario = Literal["UMi", "UMa", "RMa", "InH"]
Task = Literal["time", "frequency"]
PATCH = 4
"""A patch is PATCH instants x PATCH antennas x PATCH subcarriers (WiFo, arXiv:2412.08908)."""
ELEMENTS = 2 * PATCH**3
"""Real numbers in a patch: real and imaginary part of each entry, the part fastest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChannelSet(_Strict):
    """One set of the catalogue: a carrier, a grid of time, antennas and frequency, and who moves how fast.

    instants T, sampling_ms apart; rows x cols half-wavelength panel, N = rows * cols; subcarriers K, spacing_khz apart.
    """

    name: str
    carrier_ghz: float = Field(ge=0.5, le=100)
    subcarriers: int = Field(ge=2 * PATCH)
    spacing_khz: float = Field(gt=0)
    instants: int = Field(ge=2 * PATCH)
    sampling_ms: float = Field(gt=0)
    rows: int = Field(ge=1)
    cols: int = Field(ge=1)
    scenario: Scenario
    los: bool
    speed_kmh: tuple[float, float]
    delay_scale: float = Field(default=1.0, gt=0, description="of all path delays, against TR 38.901")

    @property
    def antennas(self) -> int:
        return self.rows * self.cols

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time, antennas and frequency."""
        return self.instants // PATCH, self.antennas // PATCH, self.subcarriers // PATCH

    @property
    def group(self) -> str:
        """Sets of one grid are one group of the corpus."""
        return "x".join(map(str, self.grid))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def coherence_ms(self) -> float:
        """Clarke's coherence time 0.423 / f_D at the top speed, ms (Rappaport, Wireless Communications, eq. 5.40.c)."""
        doppler_hz = float(max_doppler_hz(self.speed_kmh[1], self.carrier_ghz))
        return 423.0 / doppler_hz

    @model_validator(mode="after")
    def _whole_patches(self) -> "ChannelSet":
        for what, size in (("instants", self.instants), ("antennas", self.antennas), ("subcarriers", self.subcarriers)):
            if size % PATCH:
                raise ValueError(f"set {self.name}: {what} {size} must be a multiple of the patch ({PATCH})")
        return self


def _catalogue() -> dict[str, ChannelSet]:
    """Table 1 of WiFo, regenerated with Sionna: D17-s and D18-s at carriers of their own, D19-s at 28 GHz."""
    fields = (
        "name", "carrier_ghz", "subcarriers", "spacing_khz", "instants", "sampling_ms", "rows", "cols", "scenario", "los",
        "speed_kmh",
    )  # fmt: skip
    slow, walk, drive, train = (0.0, 10.0), (3.0, 50.0), (30.0, 100.0), (120.0, 300.0)
    rows = (
        ("D1-s", 1.5, 128, 90, 24, 1.0, 1, 4, "UMi", False, walk),
        ("D2-s", 1.5, 128, 180, 24, 0.5, 2, 4, "RMa", False, train),
        ("D3-s", 1.5, 64, 90, 16, 1.0, 1, 8, "InH", True, slow),
        ("D4-s", 1.5, 32, 180, 16, 0.5, 4, 8, "UMa", True, drive),
        ("D5-s", 2.5, 64, 180, 24, 0.5, 2, 2, "RMa", False, train),
        ("D6-s", 2.5, 128, 90, 24, 1.0, 2, 4, "UMi", True, walk),
        ("D7-s", 2.5, 32, 360, 16, 0.5, 4, 8, "UMa", True, drive),
        ("D8-s", 2.5, 64, 90, 16, 1.0, 4, 4, "InH", False, slow),
        ("D9-s", 4.9, 128, 180, 24, 1.0, 1, 4, "UMi", False, walk),
        ("D10-s", 4.9, 64, 180, 24, 0.5, 2, 4, "RMa", True, train),
        ("D11-s", 4.9, 64, 90, 16, 0.5, 4, 4, "UMa", False, drive),
        ("D12-s", 4.9, 32, 180, 16, 1.0, 4, 8, "InH", True, slow),
        ("D13-s", 5.9, 64, 90, 24, 0.5, 2, 8, "RMa", True, train),
        ("D14-s", 5.9, 128, 180, 24, 1.0, 2, 4, "UMi", False, walk),
        ("D15-s", 5.9, 64, 90, 16, 1.0, 4, 4, "InH", True, slow),
        ("D16-s", 5.9, 32, 360, 16, 0.5, 4, 8, "UMa", False, drive),
        ("D17-s", 3.5, 32, 180, 16, 0.5, 4, 8, "UMa", False, drive),
        ("D18-s", 6.7, 64, 180, 24, 1.0, 4, 4, "UMi", True, walk),
        ("D19-s", 28.0, 32, 360, 16, 0.25, 4, 8, "UMa", True, drive),
    )
    sets = (ChannelSet.model_validate(dict(zip(fields, row, strict=True))) for row in rows)
    return {item.name: item for item in sets}


CATALOGUE = _catalogue()


class Crop(_Strict):
    """A smaller grid of the same set: the first instants and subcarriers, a corner of the panel."""

    instants: int = Field(ge=2 * PATCH)
    rows: int = Field(ge=1)
    cols: int = Field(ge=1)
    subcarriers: int = Field(ge=2 * PATCH)


Role = Literal["seen", "heldout_site", "heldout_band"]
HELD_OUT: dict[str, Role] = {"D17-s": "heldout_site", "D18-s": "heldout_site", "D19-s": "heldout_band"}


class SetChoice(_Strict):
    """A set of this corpus. role: seen in training, or held out whole (its site, or its band too).

    file: a HDF5 .mat in the original layout under the rankd home, instead of a simulation. Its samples are split in order by
    `split_shares`; it does not tell the speed of a sample, so the middle of the set's range stands in for it.
    own: the grid and carrier of a set that the catalogue does not have.
    """

    name: str
    role: Role = "seen"
    crop: Crop | None = None
    file: str | None = None
    key: str = Field(default="X_val", description="of the array in the file: the published test files name it X_val")
    own: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _known(self) -> "SetChoice":
        self.resolved()
        return self

    def resolved(self) -> ChannelSet:
        """The set with its crop. Raises ValueError naming what is wrong."""
        if self.own is not None:
            base = ChannelSet.model_validate({**self.own, "name": self.name})
        elif self.name in CATALOGUE:
            base = CATALOGUE[self.name]
        else:
            raise ValueError(f"set {self.name!r}: not in the catalogue ({', '.join(CATALOGUE)}); describe it under own")
        return base if self.crop is None else self._cropped(base)

    def as_published(self) -> ChannelSet:
        """The set without its crop: the grid of its file."""
        return self.model_copy(update={"crop": None}).resolved()

    def _cropped(self, base: ChannelSet) -> ChannelSet:
        assert self.crop is not None
        for field in ("instants", "rows", "cols", "subcarriers"):
            if getattr(self.crop, field) > getattr(base, field):
                raise ValueError(f"set {self.name}: crop.{field} {getattr(self.crop, field)} exceeds its {getattr(base, field)}")
        return ChannelSet.model_validate({**base.model_dump(), **self.crop.model_dump()})


class DeployConfig(_Strict):
    """Which question the deployed file answers: the grid of this set, and time or frequency."""

    name: str
    task: Task = "time"


class ChannelCorpusConfig(_Strict):
    """The corpus of one channel prediction study; every field may be set in YAML."""

    sets: tuple[SetChoice, ...] = Field(
        default_factory=lambda: tuple(SetChoice(name=name, role=HELD_OUT.get(name, "seen")) for name in CATALOGUE),
        min_length=1,
    )
    train_samples: int = Field(default=9000, ge=1, description="of each seen set")
    val_samples: int = Field(default=1000, ge=1, description="of each seen set")
    test_samples: int = Field(default=2000, ge=1, description="of each set, held out or not")
    split_shares: tuple[float, float, float] = Field(default=(0.70, 0.15, 0.15), description="of a file's samples")
    snr_db: float = Field(default=20.0, description="of the noise that is added once to each channel")
    deploy: DeployConfig = DeployConfig(name="D17-s", task="time")
    shard_samples: int = Field(default=1000, ge=1)
    batch_samples: int = Field(default=128, ge=1)
    tasks: tuple[Task, ...] = Field(default=("time", "frequency"), min_length=1, description="what rows ask, in turn")
    pad_to: int = Field(default=0, ge=0, description="patches; for rows that join others of a larger grid")

    @model_validator(mode="after")
    def _consistent(self) -> "ChannelCorpusConfig":
        names = [item.name for item in self.sets]
        if len(set(names)) != len(names):
            raise ValueError(f"every set needs a name of its own, found {names}")
        if all(item.role != "seen" for item in self.sets):
            raise ValueError("at least one set must have role seen")
        if self.deploy.name not in names:
            raise ValueError(f"deploy.name {self.deploy.name!r} is not one of the corpus' sets {names}")
        seen_bands = {item.resolved().carrier_ghz for item in self.sets if item.role == "seen"}
        for item in self.sets:
            found = item.resolved()
            if item.role == "heldout_band" and found.carrier_ghz in seen_bands:
                raise ValueError(f"set {item.name} is held out by band, but {found.carrier_ghz:g} GHz is seen in training")
        return self

    @property
    def resolved(self) -> dict[str, ChannelSet]:
        """Each set with its crop, by name."""
        return {item.name: item.resolved() for item in self.sets}

    def choice(self, name: str) -> SetChoice:
        """How the set of that name was chosen."""
        return next(item for item in self.sets if item.name == name)

    @property
    def most_tokens(self) -> int:
        """Patches of the largest grid: rows of smaller ones are padded to it."""
        return max(self.pad_to, *(item.tokens for item in self.resolved.values()))


# -- the field ------------------------------------------------------------------------------------------------------------
SHIFTS = {
    "speed_60": Shift("users move at 55 to 65 km/h", "doppler"),
    "delay_spread_x3": Shift("all path delays, and so the delay spread, three times as long", "delay_spread"),
    "band_28": Shift("the carrier is refarmed to 28 GHz", "refarmed_band"),
    "interference": Shift("another network on the carrier: the channel is known 10 dB worse", "power"),
}


def field_config(cfg: ChannelCorpusConfig, shifts: frozenset[str], rows: int) -> ChannelCorpusConfig:
    """The set and question that the deployed file is for, simulated anew, and what `shifts` do to it."""
    chosen = cfg.choice(cfg.deploy.name)
    changed: dict[str, Any] = chosen.as_published().model_dump(exclude={"name"})
    if "speed_60" in shifts:
        changed["speed_kmh"] = (55.0, 65.0)
    if "delay_spread_x3" in shifts:
        changed["delay_scale"] *= 3.0
    if "band_28" in shifts:
        changed["carrier_ghz"] = 28.0
    return cfg.model_copy(
        update={
            "sets": (SetChoice(name=chosen.name, crop=chosen.crop, own=changed),),
            "train_samples": rows,
            "val_samples": 0,
            "test_samples": 0,
            "snr_db": cfg.snr_db - (10.0 if "interference" in shifts else 0.0),
            "tasks": (cfg.deploy.task,),
            "pad_to": cfg.most_tokens,
        }
    )
