"""What a beam management corpus is made of: array, codebooks, bands, sites, link budget, sample counts."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
        fastest = max(s.speed_kmh[1] for s in self.sites) / 3.6
        way_m = fastest * (self.history - 1) * self.ssb_period_ms * 1e-3
        if way_m > 5.0:
            raise ValueError(
                f"a user would move {way_m:.1f} m within history; rays are frozen over a sample, so at most 5 m "
                "(lower history, ssb_period_ms or speed_kmh)"
            )
        return self
