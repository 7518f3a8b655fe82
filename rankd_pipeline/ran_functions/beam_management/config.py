"""What a beam management corpus is made of: array, codebooks, bands, sites, link budget, sample counts."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankd_pipeline.ran_functions.contract import Shift


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArrayConfig(_Strict):
    """A uniform rectangular panel, rows (vertical) x cols (horizontal); Set A is its DFT codebook."""

    rows: int = Field(default=4, ge=1, le=64)
    cols: int = Field(default=16, ge=1, le=64)
    vertical_spacing: float = Field(default=0.8, gt=0, le=2, description="in wavelengths; 0.8 is usual for macro panels")
    horizontal_spacing: float = Field(default=0.5, gt=0, le=2, description="in wavelengths")
    element_gain_dbi: float = Field(default=8.0, description="peak gain of a TR 38.901 Table 7.3-1 element; for the EIRP")


class SubArrayConfig(_Strict):
    """The sub-array whose DFT beams are the wide SSB beams (Set B)."""

    rows: int = Field(default=2, ge=1)
    cols: int = Field(default=8, ge=1)


class BandConfig(_Strict):
    """A carrier: its numerology, EIRP and the users' noise figure."""

    ghz: float = Field(ge=0.5, le=100.0)
    role: Literal["train", "heldout"] = "train"
    scs_khz: float = 30.0
    resource_blocks: int = Field(default=273, ge=20, description="bandwidth = resource_blocks * 12 * scs_khz")
    eirp_dbm: float = Field(description="of one narrow beam at its peak, over the whole bandwidth")
    noise_figure_db: float = 9.0


class SiteConfig(_Strict):
    """One cell site: TR 38.901 scenario, geometry of the sector and who is in it."""

    name: str
    scenario: Literal["UMi", "UMa"]
    role: Literal["seen", "heldout"] = "seen"
    isd_m: float = Field(gt=20)
    bs_height_m: float = Field(gt=1.5)
    downtilt_deg: float = Field(default=6.0, ge=-10, le=45)
    indoor_share: float = Field(ge=0, le=1)
    speed_kmh: tuple[float, float]
    sector_deg: float = Field(default=120.0, gt=0, le=180, description="azimuth opening, centred on boresight")
    min_distance_m: float = Field(default=10.0, ge=10)


class MeasurementConfig(_Strict):
    """How a user measures one reference signal; the same for Set B and for the beam sweeps."""

    n_re: int = Field(default=127, ge=12, description="REs averaged: the SSS has 127")
    coherent_re: int = Field(default=12, ge=1, description="REs over which the UE averages coherently: one resource block")
    implementation_error_db: float = Field(
        default=1.3, ge=0, description="1 sigma a beam: 3 dB relative accuracy (TS 38.133 clause 10.1) as a 90 % bound on two"
    )
    detection_snr_db: float = -3.0


def _default_bands() -> tuple[BandConfig, ...]:
    """n78 and n257/n261 to train on; 10 GHz, in the upper mid-band of the Rel-19 channel study, is held out.

    EIRP is 26 dB (64 elements of 8 dBi) above a transmit power of 44, 40 and 42 dBm.
    """
    return (
        BandConfig(ghz=3.5, scs_khz=30.0, resource_blocks=273, eirp_dbm=70.0, noise_figure_db=9.0),
        BandConfig(ghz=28.0, scs_khz=120.0, resource_blocks=66, eirp_dbm=66.0, noise_figure_db=10.0),
        BandConfig(ghz=10.0, role="heldout", scs_khz=60.0, resource_blocks=135, eirp_dbm=68.0, noise_figure_db=9.0),
    )


def _default_sites() -> tuple[SiteConfig, ...]:
    """Ten dense-urban sites around the layout that beam management is studied on (ISD 200 m, UMa 25 m, UMi 10 m).

    They differ in what changes the beam statistics: inter-site distance and height (elevation and SNR), indoor share
    (O2I loss and angle spread), speed, tilt. Tilts are small: the panel steers by its beams, and users are then spread
    over the beam rows instead of filling one. The two held-out sites lie inside the range of the seen ones.
    """
    umi, uma = "UMi", "UMa"
    names = (
        "name", "scenario", "role", "isd_m", "bs_height_m", "downtilt_deg", "indoor_share", "speed_kmh", "min_distance_m",
    )  # fmt: skip
    rows = (
        ("market_square", umi, "seen", 100.0, 10.0, 0.0, 0.1, (0.0, 5.0), 10.0),
        ("old_town", umi, "seen", 130.0, 10.0, 0.0, 0.2, (0.0, 10.0), 10.0),
        ("high_street", umi, "seen", 150.0, 12.0, 2.0, 0.0, (3.0, 40.0), 10.0),
        ("station", umi, "seen", 120.0, 12.0, 2.0, 0.2, (0.0, 5.0), 10.0),
        ("office_park", umi, "seen", 120.0, 10.0, 0.0, 0.5, (0.0, 5.0), 10.0),
        ("ring_road", uma, "seen", 220.0, 25.0, 6.0, 0.0, (20.0, 60.0), 35.0),
        ("downtown", uma, "seen", 200.0, 25.0, 6.0, 0.2, (0.0, 30.0), 35.0),
        ("harbour", uma, "seen", 200.0, 30.0, 8.0, 0.0, (0.0, 30.0), 35.0),
        ("riverside", umi, "heldout", 125.0, 11.0, 1.0, 0.15, (0.0, 20.0), 10.0),
        ("hospital", uma, "heldout", 210.0, 27.0, 7.0, 0.1, (0.0, 30.0), 35.0),
    )
    return tuple(SiteConfig.model_validate(dict(zip(names, row, strict=True))) for row in rows)


class BeamCorpusConfig(_Strict):
    """The corpus of one beam management study; every field may be set in YAML."""

    array: ArrayConfig = ArrayConfig()
    set_b: SubArrayConfig = SubArrayConfig()
    bands: tuple[BandConfig, ...] = Field(default_factory=_default_bands, min_length=1)
    sites: tuple[SiteConfig, ...] = Field(default_factory=_default_sites, min_length=1)
    measurement: MeasurementConfig = MeasurementConfig()
    ssb_period_ms: float = Field(default=20.0, gt=0)
    reported_beams: int | None = Field(default=None, ge=1, description="strongest beams in a report; null: all of Set B")
    history: int = Field(default=1, ge=1, le=16, description="SSB instants in a sample, oldest first")
    labelled_share: float = Field(default=0.30, gt=0, le=1, description="of the training drops")
    split_shares: tuple[float, float, float] = (0.70, 0.15, 0.15)
    seen_samples: int = Field(default=34_000, ge=1)
    heldout_site_samples: int = Field(default=10_000, ge=0)
    heldout_band_samples: int = Field(default=10_000, ge=0)
    ues_per_drop: int = Field(default=10, ge=1, le=64, description="active users of a sector; they share the sweeps of a drop")
    delay_scale: float = Field(default=1.0, gt=0, description="stretches all path delays, and so the delay spread")
    ssb_fault_db: dict[int, float] = Field(
        default={}, description="SSB beam -> dB that it radiates too little (a broken amplifier)"
    )
    shard_samples: int = Field(default=1024, ge=1)
    batch_samples: int = Field(default=320, ge=1)

    @property
    def n_set_a(self) -> int:
        return self.array.rows * self.array.cols

    @property
    def n_set_b(self) -> int:
        return self.set_b.rows * self.set_b.cols

    @property
    def beams_in_report(self) -> int:
        return self.n_set_b if self.reported_beams is None else min(self.reported_beams, self.n_set_b)

    @model_validator(mode="after")
    def _consistent(self) -> "BeamCorpusConfig":
        a, b = self.array, self.set_b
        if a.rows % b.rows or a.cols % b.cols:
            raise ValueError(f"set_b {b.rows}x{b.cols} must divide the array {a.rows}x{a.cols}")
        if not math.isclose(sum(self.split_shares), 1.0, abs_tol=1e-6) or min(self.split_shares) < 0:
            raise ValueError(f"split_shares must be three shares that add up to 1, found {self.split_shares}")
        for what, names in (("site", [s.name for s in self.sites]), ("band", [b.ghz for b in self.bands])):
            if len(set(names)) != len(names):
                raise ValueError(f"every {what} needs a name of its own, found {names}")
        if all(s.role == "heldout" for s in self.sites) or all(b.role == "heldout" for b in self.bands):
            raise ValueError("at least one site must be seen and one band must have role train")
        if self.heldout_site_samples and all(s.role == "seen" for s in self.sites):
            raise ValueError("heldout_site_samples is set but no site has role heldout")
        if self.heldout_band_samples and all(b.role == "train" for b in self.bands):
            raise ValueError("heldout_band_samples is set but no band has role heldout")
        unknown = [beam for beam in self.ssb_fault_db if not 0 <= beam < self.n_set_b]
        if unknown:
            raise ValueError(f"ssb_fault_db names beam {unknown[0]}; there are 0 to {self.n_set_b - 1}")
        fastest = max(s.speed_kmh[1] for s in self.sites) / 3.6
        way_m = fastest * (self.history - 1) * self.ssb_period_ms * 1e-3
        if way_m > 5.0:
            raise ValueError(
                f"a user would move {way_m:.1f} m within history; rays are frozen over a sample, so at most 5 m "
                "(lower history, ssb_period_ms or speed_kmh)"
            )
        return self


def transmit_power_per_re_dbm(cfg: BeamCorpusConfig, band: BandConfig) -> float:
    """Total transmit power of the panel in one resource element, from the EIRP of one narrow beam over the whole bandwidth."""
    total_dbm = band.eirp_dbm - 10 * math.log10(cfg.n_set_a) - cfg.array.element_gain_dbi
    return total_dbm - 10 * math.log10(12 * band.resource_blocks)


# -- the field ------------------------------------------------------------------------------------------------------------
SHIFTS: dict[str, Shift] = {
    "uma": Shift("the small cells become UMa macro cells (TR 38.901), 25 m high", "scenario"),
    "speed_60": Shift("users move at 60 km/h instead of 3", "doppler"),
    "delay_spread_x3": Shift("all path delays, and so the delay spread, three times as long", "delay_spread"),
    "band_28": Shift("the carrier is refarmed from the lowest training band to the highest, or to 28 GHz", "refarmed_band"),
    "new_site": Shift("half of the users are at new sites: low panels among towers, all users indoors and above", "new_site"),
    "broken_beam": Shift("one SSB beam radiates nothing: its reports are missing", "broken_element"),
    "weak_beam": Shift("one SSB beam is 10 dB too weak: its amplifier is failing", "broken_element"),
}
WALKING_KMH, DRIVING_KMH = (2.0, 4.0), (55.0, 65.0)
NEW_SITE = SiteConfig(
    name="high_rise", scenario="UMi", isd_m=80.0, bs_height_m=4.0, downtilt_deg=-10.0, indoor_share=1.0, speed_kmh=WALKING_KMH
)  # fmt: skip


def field_config(cfg: BeamCorpusConfig, shifts: frozenset[str], rows: int) -> BeamCorpusConfig:
    """The network's small cells with walking users on its lowest training band, and what `shifts` do to them."""
    seen = [site for site in cfg.sites if site.role == "seen"]
    sites = [site for site in seen if site.scenario == "UMi"] or seen
    bands = sorted((band for band in cfg.bands if band.role == "train"), key=lambda band: band.ghz)
    if "band_28" in shifts and len(bands) == 1:
        bands.append(_default_bands()[1])
    macro = {"scenario": "UMa", "bs_height_m": 25.0, "downtilt_deg": 6.0, "min_distance_m": 35.0}
    speed = DRIVING_KMH if "speed_60" in shifts else WALKING_KMH
    placed = [site.model_copy(update={"speed_kmh": speed, **(macro if "uma" in shifts else {})}) for site in sites]
    if "uma" in shifts:
        placed = [site.model_copy(update={"isd_m": max(site.isd_m, 200.0)}) for site in placed]
    if "new_site" in shifts:  # as many users as at all the others together
        placed += [NEW_SITE.model_copy(update={"name": f"{NEW_SITE.name}_{number}"}) for number in range(1, len(placed) + 1)]
    beam = cfg.n_set_b // 2 - 1
    fault = {"broken_beam": 200.0, "weak_beam": 10.0}
    faults = {beam: max(loss for name, loss in fault.items() if name in shifts)} if shifts & set(fault) else {}
    return cfg.model_copy(
        update={
            "sites": tuple(placed),
            "bands": (bands[-1 if "band_28" in shifts else 0],),
            "delay_scale": cfg.delay_scale * (3.0 if "delay_spread_x3" in shifts else 1.0),
            "ssb_fault_db": {**cfg.ssb_fault_db, **faults},
            "seen_samples": rows,
            "heldout_site_samples": 0,
            "heldout_band_samples": 0,
            "labelled_share": 1.0,
            "split_shares": (1.0, 0.0, 0.0),
        }
    )
