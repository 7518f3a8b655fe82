"""What a channel estimation corpus is made of: allocation, carriers, channel profiles, receivers, sample counts."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.ran_functions.contract import Shift

Model = Literal[
    "TDL-A", "TDL-B", "TDL-C", "TDL-D", "TDL-E", "CDL-A", "CDL-B", "CDL-C", "CDL-D", "CDL-E", "UMi", "UMa"
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProfileConfig(_Strict):
    """One kind of channel of TR 38.901: a tapped or clustered delay line (clause 7.7), or users dropped in a sector (7.5).

    delay_spread_ns: RMS delay spread of a user; drawn log-uniformly for delay lines, and in a sector the users whose own
    delay spread lies outside are left out. The sector's geometry (isd_m, bs_height_m, indoor_share) is Sionna's default for
    the scenario where it is null.
    """

    name: str
    model: Model
    role: Literal["seen", "heldout"] = "seen"
    delay_spread_ns: tuple[float, float] = (30.0, 300.0)
    speed_kmh: tuple[float, float] = (3.0, 120.0)
    isd_m: float | None = Field(default=None, gt=20)
    bs_height_m: float | None = Field(default=None, gt=1.5)
    indoor_share: float | None = Field(default=None, ge=0, le=1)

    @property
    def family(self) -> str:
        """TDL, CDL, UMi or UMa."""
        return self.model.split("-")[0]

    @model_validator(mode="after")
    def _ranges_rise(self) -> "ProfileConfig":
        for what, (low, high) in (("delay_spread_ns", self.delay_spread_ns), ("speed_kmh", self.speed_kmh)):
            if not 0 < low <= high:
                raise ValueError(f"profile {self.name}: {what} must be two positive numbers that do not fall, found {low}, {high}")
        return self


class BandConfig(_Strict):
    """A carrier: with the speed it makes the Doppler."""

    ghz: float = Field(ge=0.5, le=100.0)
    role: Literal["train", "heldout"] = "train"


def _default_bands() -> tuple[BandConfig, ...]:
    """n41 and n78 to train on; n79, a third faster in Doppler than anything seen, is held out."""
    return BandConfig(ghz=2.6), BandConfig(ghz=3.5), BandConfig(ghz=4.7, role="heldout")


def _default_profiles() -> tuple[ProfileConfig, ...]:
    """Delay lines with and without a line of sight, and two kinds of street; one of each family is held out."""
    names = ("name", "model", "role", "isd_m", "bs_height_m", "indoor_share")
    rows = (
        ("tdl_a", "TDL-A", "seen", None, None, None),
        ("tdl_c", "TDL-C", "seen", None, None, None),
        ("tdl_d", "TDL-D", "seen", None, None, None),
        ("tdl_e", "TDL-E", "seen", None, None, None),
        ("cdl_a", "CDL-A", "seen", None, None, None),
        ("cdl_c", "CDL-C", "seen", None, None, None),
        ("cdl_d", "CDL-D", "seen", None, None, None),
        ("old_town", "UMi", "seen", 150.0, 10.0, 0.2),
        ("high_street", "UMi", "seen", 200.0, 10.0, 0.0),
        ("ring_road", "UMa", "seen", 500.0, 25.0, 0.0),
        ("suburb", "UMa", "seen", 400.0, 30.0, 0.5),
        ("tdl_b", "TDL-B", "heldout", None, None, None),
        ("cdl_b", "CDL-B", "heldout", None, None, None),
        ("riverside", "UMi", "heldout", 170.0, 10.0, 0.1),
        ("harbour", "UMa", "heldout", 450.0, 27.0, 0.2),
    )
    return tuple(ProfileConfig.model_validate(dict(zip(names, row, strict=True))) for row in rows)


class ChannelCorpusConfig(_Strict):
    """The corpus of one channel estimation study; every field may be set in YAML. Counts are slots, over all their antennas."""

    resource_blocks: int = Field(default=4, ge=2, le=64, description="of the allocation; the models are made for this size")
    scs_khz: Literal[15, 30, 60] = 30
    bands: tuple[BandConfig, ...] = Field(default_factory=_default_bands, min_length=1)
    profiles: tuple[ProfileConfig, ...] = Field(default_factory=_default_profiles, min_length=1)
    receive_antennas: tuple[int, int] = Field(default=(1, 4), description="fewest and most of a drop, half a wavelength apart")
    snr_db: tuple[float, float] = Field(default=(-5.0, 25.0), description="of a data resource element on one antenna, drawn a slot")
    slots_per_drop: int = Field(default=4, ge=1, le=64, description="slots of one user: its delay spread, speed and antennas")
    labelled_share: float = Field(default=1.0, gt=0, le=1, description="of the training drops")
    split_shares: tuple[float, float, float] = (0.70, 0.15, 0.15)
    seen_slots: int = Field(default=12_000, ge=1)
    heldout_profile_slots: int = Field(default=1_600, ge=0)
    heldout_band_slots: int = Field(default=1_600, ge=0)
    shard_slots: int = Field(default=512, ge=1)

    @property
    def subcarriers(self) -> int:
        return 12 * self.resource_blocks

    @model_validator(mode="after")
    def _consistent(self) -> "ChannelCorpusConfig":
        fewest, most = self.receive_antennas
        if not 1 <= fewest <= most <= 64:
            raise ValueError(
                f"receive_antennas must be two numbers between 1 and 64 that do not fall, found {self.receive_antennas}"
            )
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db must not fall, found {self.snr_db}")
        if not math.isclose(sum(self.split_shares), 1.0, abs_tol=1e-6) or min(self.split_shares) < 0:
            raise ValueError(f"split_shares must be three shares that add up to 1, found {self.split_shares}")
        for what, names in (("profile", [p.name for p in self.profiles]), ("band", [b.ghz for b in self.bands])):
            if len(set(names)) != len(names):
                raise ValueError(f"every {what} needs a name of its own, found {names}")
        if all(p.role == "heldout" for p in self.profiles) or all(b.role == "heldout" for b in self.bands):
            raise ValueError("at least one profile must be seen and one band must have role train")
        if self.heldout_profile_slots and all(p.role == "seen" for p in self.profiles):
            raise ValueError("heldout_profile_slots is set but no profile has role heldout")
        if self.heldout_band_slots and all(b.role == "train" for b in self.bands):
            raise ValueError("heldout_band_slots is set but no band has role heldout")
        return self


# -- the field ------------------------------------------------------------------------------------------------------------
SHIFTS: dict[str, Shift] = {
    "fast": Shift("users drive at 100 to 120 km/h instead of walking", "doppler"),
    "long_delays": Shift("delay spreads of 250 to 300 ns instead of 30 to 100: echoes from across a valley", "delay_spread"),
    "cell_edge": Shift("the SNR is 10 dB lower", "power"),
    "macro": Shift("the small cells become macro cells: long delays, and 10 dB less SNR", "scenario"),
    "refarmed": Shift("the carrier moves from the lowest band to the highest", "refarmed_band"),
    "new_site": Shift("half of the users are at new sites, with a strong line of sight", "new_site"),
}
SMALL_CELL = {"delay_spread_ns": (30.0, 100.0), "speed_kmh": (2.0, 4.0)}
VALLEY_NS, DRIVING_KMH = (250.0, 300.0), (100.0, 120.0)
NEAR_DB, FAR_DB = (5.0, 25.0), (-5.0, 15.0)


def field_config(cfg: ChannelCorpusConfig, shifts: frozenset[str], rows: int) -> ChannelCorpusConfig:
    """Small cells with walking users: the corpus' seen delay lines on its lowest training band, and what `shifts` do to them."""
    seen = [profile for profile in cfg.profiles if profile.role == "seen"]
    lines = [profile for profile in seen if profile.family in ("TDL", "CDL")] or seen
    bands = sorted((band for band in cfg.bands if band.role == "train"), key=lambda band: band.ghz)
    changes: dict = dict(SMALL_CELL)
    if shifts & {"long_delays", "macro"}:
        changes["delay_spread_ns"] = VALLEY_NS
    if "fast" in shifts:
        changes["speed_kmh"] = DRIVING_KMH
    placed = [profile.model_copy(update=changes) for profile in lines]
    if "new_site" in shifts:  # as many users as at all the others together
        placed += [
            ProfileConfig(name=f"skyline_{number}", model="TDL-E", **changes) for number in range(1, len(lines) + 1)
        ]  # fmt: skip
    highest = BandConfig(ghz=max(band.ghz for band in cfg.bands))
    if "refarmed" in shifts and highest.ghz == bands[0].ghz:
        highest = _default_bands()[-1]
    antennas = sum(cfg.receive_antennas) / 2
    return cfg.model_copy(
        update={
            "profiles": tuple(placed),
            "bands": (highest.model_copy(update={"role": "train"}) if "refarmed" in shifts else bands[0],),
            "snr_db": FAR_DB if shifts & {"cell_edge", "macro"} else NEAR_DB,
            # A few more than asked for: how many antennas a drop has is chance.
            "seen_slots": max(1, math.ceil(1.1 * rows / antennas)),
            "heldout_profile_slots": 0,
            "heldout_band_slots": 0,
            "labelled_share": 1.0,
            "split_shares": (1.0, 0.0, 0.0),
        }
    )
