"""What a link adaptation corpus is made of: sites, bands, channels, interference, feedback, logged policies, trace counts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.ran_functions.contract import Shift

Scenario = Literal["UMi", "UMa", "TDL-A", "TDL-B", "TDL-C", "TDL-D"]
Range = tuple[float, float]
SLOT_US = 500.0
"""A slot at 30 kHz subcarrier spacing (TS 38.211 clause 4.3.2)."""
BLER_TARGET = 0.1
"""What every policy is held to, unless it is told otherwise at run time."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BandConfig(_Strict):
    """A carrier. All are FR1 at 30 kHz subcarrier spacing, so that a slot lasts 500 us in each."""

    ghz: float = Field(ge=0.5, le=7.125)
    role: Literal["train", "heldout"] = "train"


class SiteConfig(_Strict):
    """Where traces come from: the channel model and what its users do.

    snr_db is the range of a trace's mean SNR (interference off, both receive antennas combined). delay_spread_ns is read
    for TDL channels only; UMi and UMa draw their own.
    """

    name: str
    scenario: Scenario
    role: Literal["seen", "heldout"] = "seen"
    speed_kmh: Range
    snr_db: Range = (8.0, 30.0)
    indoor_share: float = Field(default=0.0, ge=0, le=1)
    delay_spread_ns: Range = (30.0, 300.0)
    shadow_sigma_db: float = Field(default=3.0, ge=0)
    shadow_distance_m: float = Field(default=13.0, gt=0, description="decorrelation distance (TR 38.901 Table 7.5-6)")
    interfered_share: float = Field(default=0.7, ge=0, le=1, description="traces that see a bursty neighbour at all")
    interference_load: Range = Field(default=(0.1, 0.6), description="share of time that the neighbour sends")
    burst_ms: Range = (2.0, 20.0)
    inr_db: Range = Field(default=(0.0, 9.0), description="interference over noise while the neighbour sends")

    @model_validator(mode="after")
    def _ranges_rise(self) -> "SiteConfig":
        for name, value in self:
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"site {self.name}: {name} falls from {value[0]} to {value[1]}")
        return self


class FeedbackConfig(_Strict):
    """How stale and how coarse the base station's knowledge is. Ranges are drawn once a trace."""

    cqi_period_slots: tuple[int, ...] = Field(default=(10, 20, 40), min_length=1)
    cqi_delay_slots: tuple[int, int] = Field(
        default=(4, 8), description="from the CSI-RS to the first slot that can use the report"
    )
    harq_delay_slots: tuple[int, int] = Field(
        default=(4, 8), description="from a transmission to the first slot that knows its ACK"
    )
    cqi_bias_db: float = Field(
        default=1.0, ge=0, description="1 sigma between users: receivers differ, CQI is only what each claims"
    )
    cqi_bias_mean_db: float = Field(default=0.0, description="what the receivers of a network claim too much on average")
    cqi_error_db: float = Field(default=0.7, ge=0, description="1 sigma of each measurement")
    doppler_error: float = Field(default=0.2, ge=0, description="1 sigma of the log of the Doppler estimate")


class PolicyConfig(_Strict):
    """Shares of the link adaptation policies that wrote the logs; off-policy variety is what makes them worth learning from.

    learned is the share of a deployed model, which makes the corpus a DAgger round (Ross et al. 2011): the states that it
    visits are labelled with the truth, too. learned_bundle is its folder, under the home, and learned_model the sha256 of
    the model in it (`model_sha256` in the bundle's manifest), so that the corpus knows which one it was.
    """

    cqi_table: float = Field(default=0.1, ge=0)
    illa: float = Field(default=0.15, ge=0)
    olla: float = Field(default=0.45, ge=0)
    random: float = Field(default=0.3, ge=0)
    learned: float = Field(default=0.0, ge=0)
    learned_bundle: str | None = None
    learned_model: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    random_spread: int = Field(default=5, ge=1, description="MCS steps around ILLA's choice, uniform, held for a few slots")
    olla_delta_up_db: Range = (0.05, 1.5)
    olla_offset_db: Range = (-6.0, 6.0)
    bler_target: Range = Field(default=(0.01, 0.3), description="targets of the logged ILLA and OLLA, log-uniform")

    @model_validator(mode="after")
    def _some_policy(self) -> "PolicyConfig":
        if not self.cqi_table + self.illa + self.olla + self.random + self.learned > 0:
            raise ValueError("all policy shares are zero; give at least one of cqi_table, illa, olla, random, learned a share")
        if self.learned and not (self.learned_bundle and self.learned_model):
            raise ValueError("learned has a share; name its learned_bundle and the model_sha256 in it as learned_model")
        return self


def _default_bands() -> tuple[BandConfig, ...]:
    """n1, n78 and n79 to train on; n41 is held out."""
    return (BandConfig(ghz=2.1), BandConfig(ghz=3.5), BandConfig(ghz=4.9), BandConfig(ghz=2.6, role="heldout"))


def _default_sites() -> tuple[SiteConfig, ...]:
    """Eight sites that differ in what makes link adaptation hard (Doppler, bursts, fading depth), and two held out."""
    rows: tuple[dict, ...] = (
        {"name": "market_square", "scenario": "UMi", "speed_kmh": (1, 5), "indoor_share": 0.2, "interference_load": (0.3, 0.7)},
        {"name": "office_park", "scenario": "UMi", "speed_kmh": (0.5, 3), "indoor_share": 0.8, "interfered_share": 0.5},
        {"name": "high_street", "scenario": "UMi", "speed_kmh": (3, 40)},
        {"name": "ring_road", "scenario": "UMa", "speed_kmh": (30, 80), "shadow_sigma_db": 4, "shadow_distance_m": 40},
        {"name": "harbour", "scenario": "UMa", "speed_kmh": (3, 30), "shadow_distance_m": 40, "burst_ms": (5, 40)},
        {"name": "motorway", "scenario": "TDL-D", "speed_kmh": (60, 120), "delay_spread_ns": (30, 100), "interfered_share": 0.4},
        {"name": "test_track_a", "scenario": "TDL-A", "speed_kmh": (3, 60), "delay_spread_ns": (30, 100)},
        {"name": "test_track_c", "scenario": "TDL-C", "speed_kmh": (3, 120), "delay_spread_ns": (100, 300)},
        {"name": "riverside", "scenario": "UMi", "role": "heldout", "speed_kmh": (2, 30), "indoor_share": 0.2},
        {"name": "test_track_b", "scenario": "TDL-B", "role": "heldout", "speed_kmh": (3, 90), "delay_spread_ns": (50, 200)},
    )  # fmt: skip
    return tuple(SiteConfig.model_validate(row) for row in rows)


class LinkCorpusConfig(_Strict):
    """The corpus of one link adaptation study; every field may be set in YAML."""

    bands: tuple[BandConfig, ...] = Field(default_factory=_default_bands, min_length=1)
    sites: tuple[SiteConfig, ...] = Field(default_factory=_default_sites, min_length=1)
    feedback: FeedbackConfig = FeedbackConfig()
    policies: PolicyConfig = PolicyConfig()
    allocations_prb: tuple[int, ...] = Field(default=(8, 24, 72), min_length=1, description="scheduled PRBs, drawn once a trace")
    symbols: int = Field(default=12, ge=2, le=14, description="OFDM symbols of a slot that carry data")
    rx_antennas: Literal[1, 2] = 2
    subcarrier_samples: int = Field(
        default=12, ge=2, description="frequencies across the allocation that the effective SINR averages"
    )
    trace_slots: int = Field(default=2048, ge=64)
    window_slots: int = Field(default=256, ge=32, description="slots of one training sample; divides trace_slots")
    step_share: float = Field(
        default=0.3, ge=0, le=1, description="traces with a sudden change of the mean SNR (a corner, a blocker)"
    )
    step_db: Range = Field(default=(5.0, 12.0), description="up or down, whichever stays within the site's snr_db")
    labelled_share: float = Field(default=1.0, gt=0, le=1, description="of the training traces; the rest are logs without truth")
    split_shares: tuple[float, float, float] = (0.50, 0.20, 0.30)
    seen_traces: int = Field(default=600, ge=1)
    heldout_site_traces: int = Field(default=72, ge=0)
    heldout_band_traces: int = Field(default=72, ge=0)
    shard_traces: int = Field(default=24, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "LinkCorpusConfig":
        if abs(sum(self.split_shares) - 1.0) > 1e-6 or min(self.split_shares) < 0 or not self.split_shares[0]:
            raise ValueError(f"split_shares {self.split_shares} are not shares of one, the first above zero")
        if self.trace_slots % self.window_slots:
            raise ValueError(f"window_slots {self.window_slots} does not divide trace_slots {self.trace_slots}")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("two sites share a name")
        if not any(site.role == "seen" for site in self.sites) or not any(band.role == "train" for band in self.bands):
            raise ValueError("the corpus needs at least one seen site and one training band")
        return self

    @property
    def windows(self) -> int:
        """Training samples of one trace."""
        return self.trace_slots // self.window_slots


SHIFTS: dict[str, Shift] = {
    "uma": Shift("the small cells become UMa macro cells (TR 38.901), 25 m high", "scenario"),
    "speed_60": Shift("users move at 60 km/h instead of 3", "doppler"),
    "band_49": Shift("the carrier is refarmed from the lowest to the highest training band (2.1 to 4.9 GHz)", "refarmed_band"),
    "new_site": Shift("half of the users are at a new site, a motorway", "new_site"),
    "busy_neighbour": Shift("the neighbour cell goes live: every user sees its bursts", "unexplained"),
    "proud_receivers": Shift("a new generation of receivers reports CQI 3 dB too high", "unexplained"),
    "slow_reports": Shift("CQI reports every 80 slots instead of 10 to 40", "unexplained"),
}
WALKING_KMH, DRIVING_KMH = (2.0, 4.0), (55.0, 65.0)
RUNNING = PolicyConfig(cqi_table=0, illa=0, olla=1, random=0, olla_delta_up_db=(0.1, 0.5), olla_offset_db=(0.0, 0.0))
"""What sends in the field: the base station's own outer loop, for services of different targets; the model speaks beside it."""
NEW_SITE = SiteConfig(name="bypass", scenario="TDL-D", speed_kmh=(80.0, 120.0), delay_spread_ns=(30.0, 100.0))


def field_config(cfg: LinkCorpusConfig, shifts: frozenset[str], rows: int) -> LinkCorpusConfig:
    """The network's small cells with walking users on its lowest training band, and what `shifts` do to them.

    The model runs in shadow mode: what is sent, and so what HARQ says, is the outer loop's.
    """
    seen = [site for site in cfg.sites if site.role == "seen"]
    sites = [site for site in seen if site.scenario == "UMi"] or seen
    bands = sorted((band for band in cfg.bands if band.role == "train"), key=lambda band: band.ghz)
    if "band_49" in shifts and len(bands) == 1:
        bands.append(_default_bands()[2])
    changes: dict = {"speed_kmh": DRIVING_KMH if "speed_60" in shifts else WALKING_KMH}
    if "uma" in shifts:
        changes |= {"scenario": "UMa", "shadow_sigma_db": 4.0, "shadow_distance_m": 40.0}
    if "busy_neighbour" in shifts:
        changes |= {"interfered_share": 1.0, "interference_load": (0.6, 0.9), "inr_db": (6.0, 12.0)}
    placed = [site.model_copy(update=changes) for site in sites]
    if "new_site" in shifts:  # as many users as at all the others together
        placed += [NEW_SITE.model_copy(update={"name": f"{NEW_SITE.name}_{number}"}) for number in range(1, len(placed) + 1)]
    reports = {}
    if "proud_receivers" in shifts:
        reports["cqi_bias_mean_db"] = cfg.feedback.cqi_bias_mean_db + 3.0
    if "slow_reports" in shifts:
        reports["cqi_period_slots"] = (80,)
    return cfg.model_copy(
        update={
            "sites": tuple(placed),
            "bands": (bands[-1 if "band_49" in shifts else 0],),
            "feedback": cfg.feedback.model_copy(update=reports),
            "policies": RUNNING,
            "seen_traces": max(1, round(rows / cfg.windows)),
            "heldout_site_traces": 0,
            "heldout_band_traces": 0,
            "labelled_share": 1.0,
            "split_shares": (1.0, 0.0, 0.0),
        }
    )
