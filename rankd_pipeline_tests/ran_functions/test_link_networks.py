"""The networks of link adaptation: monotone by construction, the same slot by slot as in one go, and deployable as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.link_adaptation.function import LinkAdaptation
from rankd_pipeline.ran_functions.link_adaptation.head import BlerHead
from rankd_pipeline.ran_functions.link_adaptation.networks import (
    LOWEST_LOG_PRICE,
    OUTPUTS,
    PRICE_LIMIT,
    PRICE_STEP,
    TARGETS,
    Deployable,
    LinkGRU,
    LinkMLP,
    LinkNetwork,
    LinkRecurrent,
    aim_key,
    forecast_loss,
    price_key,
    stepper,
)
from rankd_pipeline.ran_functions.link_adaptation.operating import first_price, operating_points
from rankd_pipeline.ran_functions.link_adaptation.policies import Learned
from rankd_pipeline.ran_functions.link_adaptation.rollout import REPORT_FIELDS, Traces, roll_out
from rankd_pipeline.ran_functions.link_adaptation.tables import CQI_TO_MCS, EFFICIENCY, N_MCS, link_tables
from rankd_pipeline.runtime import c_export, parity
from rankd_pipeline.runtime.onnx_export import export_onnx

FUNCTION = LinkAdaptation()
NETWORKS = {
    "teacher": lambda: LinkRecurrent(width=12, depth=2),
    "lstm": lambda: LinkRecurrent(kind="lstm", width=12, depth=2),
    "gru": lambda: LinkGRU(hidden=10),
    "mlp": lambda: LinkMLP(slots=6, hidden=[12, 8]),
}
CALIBRATION = {"temperature": 1.3, **{aim_key(t): 1.2 * t for t in TARGETS}, **{price_key(t): 3.0 - 5.0 * t for t in TARGETS}}


def report(n: int, slots: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (n, slots))
    fields = {
        "cqi": rng.integers(0, 16, (n, slots)), "cqi_age_slots": rng.integers(4, 30, (n, slots)),
        "harq_ack": rng.integers(0, 2, (n, slots)) * mask, "harq_mask": mask, "harq_mcs": rng.integers(0, 28, (n, slots)) * mask,
        "doppler_hz": rng.uniform(1, 400, n), "allocated_prb": rng.choice([8, 24, 72], n),
    }  # fmt: skip
    return {name: torch.from_numpy(np.asarray(fields[name], np.float32)) for name in REPORT_FIELDS}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest):
    torch.manual_seed(3)
    made = NETWORKS[request.param]()
    made.normalizer.learn(report(40, 20, 9))
    return made.eval()


def test_bler_never_falls_with_the_mcs(network):
    """Whatever the weights: they are blown up here."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(5.0)
        logits = network(**report(16, 12))
    assert logits.shape == (16, 12, N_MCS) and torch.isfinite(logits).all()
    assert (logits.diff(dim=-1) >= 0).all()


def test_one_slot_at_a_time_is_the_same_as_all_at_once(network):
    said = report(5, 25)
    state = torch.zeros(5, network.state_size)
    with torch.no_grad():
        whole = network(**said)
        for slot in range(25):
            logits, state = network.step(state, **{name: v if v.ndim == 1 else v[:, slot] for name, v in said.items()})
            torch.testing.assert_close(logits, whole[:, slot], rtol=1e-4, atol=1e-4)


def test_the_past_matters_and_the_future_does_not(network):
    said, other = report(4, 20), report(4, 20)
    other["cqi"] = other["cqi"].clone()
    other["cqi"][:, 12] = 15 - other["cqi"][:, 12]
    with torch.no_grad():
        one, two = network(**said), network(**other)
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert (one[:, 13] - two[:, 13]).abs().max() > 1e-5


def test_scaling_is_learned_and_an_unset_mask_hides_the_feedback(network):
    said = report(40, 20, 9)  # what it was learned from
    encoded = network.normalizer(**said).flatten(0, 1)
    assert encoded.mean(dim=0).abs().max() < 1e-4 and (encoded.std(dim=0) - 1).abs().max() < 1e-3
    hidden = {**said, "harq_mask": torch.zeros_like(said["harq_mask"])}
    other = {**hidden, "harq_ack": 1 - said["harq_ack"], "harq_mcs": 27 - said["harq_mcs"]}
    torch.testing.assert_close(network.normalizer(**hidden), network.normalizer(**other))


def test_self_supervision_learns_to_forecast():
    """Thirty steps on one batch of a slow CQI: the loss falls, and hiding all feedback changes it."""
    torch.manual_seed(0)
    said = report(16, 60)
    said["cqi"] = (8 + 5 * torch.sin(torch.arange(60) / 6 + torch.rand(16, 1) * 6)).round()
    model = LinkGRU(hidden=16)
    model.normalizer.learn(said)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = forecast_loss(model, said, (0.0, 0.5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# -- the decision rule ----------------------------------------------------------------------------------------------
def slot(n: int, seed: int = 8, **fields: float) -> dict[str, np.ndarray]:
    """One slot's report of n users as the deployed graph takes it, some fields set."""
    said = {name: (v if v.ndim == 1 else v[:, 0]).numpy() for name, v in report(n, 1, seed).items()}
    return {**said, **{name: np.full(n, value, np.float32) for name, value in fields.items()}}


@given(st.floats(0.001, 0.5))
@settings(max_examples=30)
def test_operating_points_follow_the_target(target):
    """Exact at the targets that were tuned, monotone in between, flat beyond them."""
    deployable = Deployable(NETWORKS["gru"](), CALIBRATION)
    aim, price = deployable.tuned(torch.tensor([*TARGETS, target]))
    torch.testing.assert_close(aim[:-1].exp(), torch.tensor([CALIBRATION[aim_key(t)] for t in TARGETS]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(price[:-1].exp(), torch.tensor([CALIBRATION[price_key(t)] for t in TARGETS]), rtol=1e-4, atol=1e-6)
    wanted = 1.2 * min(max(target, TARGETS[0]), TARGETS[-1])
    assert aim[-1].exp().item() == pytest.approx(wanted, rel=1e-3)


def test_utility_is_the_rate_less_the_price_of_what_is_lost(network):
    """In PyTorch: BLER is calibrated, and a new user pays the first price of its target."""
    asked = slot(300, harq_mask=0.0, harq_ack=0.0, bler_target=0.03, state=0.0)
    asked["state"] = np.zeros((300, network.state_size + 1), np.float32)
    found = stepper(Deployable(network, CALIBRATION))(asked)
    assert tuple(found) == OUTPUTS
    with torch.no_grad():
        logits, memory = network.step(torch.zeros(300, network.state_size), **{
            name: torch.from_numpy(asked[name]) for name in REPORT_FIELDS})  # fmt: skip
    np.testing.assert_allclose(found["bler"], torch.sigmoid(logits / 1.3), atol=1e-6)
    rate = EFFICIENCY / EFFICIENCY.max()
    lost = found["bler"] + 10.0 * np.maximum(found["bler"] - 0.5, 0.0)
    np.testing.assert_allclose(found["mcs_utility"], rate * (1 / CALIBRATION[price_key(0.03)] - lost), atol=2e-6)
    np.testing.assert_allclose(found["next_state"], np.column_stack([memory.numpy(), np.zeros(300)]), atol=1e-6)


@given(st.floats(0.01, 0.3), st.floats(-5, 5))
@settings(max_examples=30)
def test_a_loss_raises_the_price_and_a_success_lowers_it_within_limits(target, offset):
    network = NETWORKS["gru"]()
    deployable = Deployable(network, CALIBRATION)
    log_aim, log_price = (value.item() for value in deployable.tuned(torch.tensor([target])))
    for mask, ack, step in ((1.0, 0.0, 1 - np.exp(log_aim)), (1.0, 1.0, -np.exp(log_aim)), (0.0, 0.0, 0.0)):
        asked = slot(1, harq_mask=mask, harq_ack=ack, bler_target=target)
        asked["state"] = np.append(np.zeros(network.state_size), offset).astype(np.float32)[None]
        after = stepper(deployable)(asked)["next_state"][0, -1]
        wanted = np.clip(offset + PRICE_STEP * step, -PRICE_LIMIT, PRICE_LIMIT)
        assert after == pytest.approx(max(wanted, LOWEST_LOG_PRICE - log_price), abs=1e-5)


def test_a_dead_link_gets_the_most_robust_mcs_at_any_price():
    """All blocks would be lost: a low price must not throw them away at the highest rate."""

    class Dead(_Curves):
        def read_out(self, hidden):
            return torch.full((len(hidden), 28), 12.0)

    network = Dead(np.zeros(16), np.zeros(28))
    for offset in (-6.0, 0.0, 6.0):
        asked = slot(1, bler_target=0.1)
        asked["state"] = np.array([[offset]], np.float32)
        assert stepper(Deployable(network, CALIBRATION))(asked)["mcs_utility"].argmax() == 0


class _Curves(LinkNetwork):
    """BLER curves that fall around what the CQI stands for: a network that needs no training, and has no memory."""

    def __init__(self, cqi_sinr_db: np.ndarray, mcs_sinr_db: np.ndarray) -> None:
        super().__init__(1)
        self.state_size = 0
        self.cqi, self.mcs = torch.from_numpy(cqi_sinr_db).float(), torch.from_numpy(mcs_sinr_db).float()

    def hidden(self, x_BLF):
        return self.cqi[(x_BLF[..., :1] * 15).round().long()]

    def advance(self, x_BF, state_BS):
        return self.hidden(x_BF), state_BS

    def read_out(self, hidden):
        return self.mcs - hidden


def test_operating_points_are_tuned_in_the_loop():
    """Users whose SINR swings around what they report: the mean BLER that is asked for is the one that comes out."""
    links = link_tables((8, 24, 72), 12)
    rng = np.random.default_rng(0)
    n, slots = 30, 1500
    mean = rng.uniform(6, 18, (n, 1))
    now = (mean + 3 * rng.standard_normal((n, slots))).astype(np.float32)
    traces = Traces(
        cqi_NT=np.repeat(np.searchsorted(links.cqi_sinr_db_Q, mean) - 1, slots, axis=1).astype(np.uint8),
        cqi_age_slots_NT=np.full((n, slots), 6, np.uint8), doppler_hz_N=np.full(n, 50.0, np.float32),
        allocated_prb_N=np.full(n, 24, np.int16), harq_delay_N=np.full(n, 5),
        bler_NTM=links.bler_at(now.ravel(), np.ones(n * slots, int)).reshape(n, slots, -1).astype(np.float16),
        draw_NT=rng.random((n, slots)).astype(np.float32), step_slot_N=np.full(n, -1),
    )  # fmt: skip
    network = _Curves(links.cqi_sinr_db_Q, links.cqi_sinr_db_Q[np.searchsorted(CQI_TO_MCS, np.arange(28)).clip(max=15)])
    logits = network.read_out(network.cqi[torch.from_numpy(traces.cqi_NT.reshape(-1, 1)).long()])
    true = traces.bler_NTM.reshape(n * slots, -1).astype(np.float32)
    found = {"temperature": 1.0, **operating_points(network, 1.0, traces, torch.sigmoid(logits).numpy(), true)}
    aims = [found[aim_key(target)] for target in TARGETS]
    assert aims == sorted(aims) and all(found[price_key(target)] >= np.exp(LOWEST_LOG_PRICE) for target in TARGETS)
    got = [1 - roll_out(traces, Learned(stepper(Deployable(network, found)), 1, target)).ack_NT.mean() for target in TARGETS]
    np.testing.assert_allclose(got[1:3], TARGETS[1:3], rtol=0.12)
    # At their best rate these users lose 13 % of their blocks; the floor of the price keeps them from the 30 % they may lose.
    assert 0.13 < got[3] <= got[4] < 0.25


def test_first_price_is_the_lowest_that_keeps_the_promise():
    """Honest logistic curves: a stricter promise costs more, a lax one nothing."""
    rng = np.random.default_rng(0)
    known = rng.uniform(0, 25, (4000, 1))
    true = 1 / (1 + np.exp(2.0 * (known + 1.5 * rng.standard_normal((4000, 1)) - np.arange(28))))
    said = 1 / (1 + np.exp(1.1 * (known - np.arange(28))))
    prices = [first_price(said, true, bler) for bler in (0.02, 0.05, 0.1, 0.9)]
    assert prices == sorted(prices, reverse=True) and prices[0] > 1.0
    assert prices[-1] == pytest.approx(np.exp(LOWEST_LOG_PRICE))
    chosen = (EFFICIENCY * (1 / prices[1] - said - 10 * np.maximum(said - 0.5, 0))).argmax(axis=1)
    assert true[np.arange(4000), chosen].mean() == pytest.approx(0.05, abs=2e-3)


def test_untuned_calibration_is_neutral():
    head = BlerHead()
    assert head.neutral is not None
    outputs = np.random.default_rng(0).standard_normal((20, 5, 28))
    labels = 1 / (1 + np.exp(-outputs / 2))
    found = head.fit_calibration(outputs, labels)
    assert found["temperature"] == pytest.approx(2.0, rel=1e-2)
    assert {**head.neutral, "temperature": found["temperature"]} == found


@pytest.mark.parametrize("kind", ["gru", "mlp"])
def test_exported_slot_is_the_module_s_in_onnx_and_c(kind, tmp_path: Path):
    """With the state of a running link, within the bounds of the parity gate."""
    settings = {"gru": {"kind": "gru", "hidden": 12}, "mlp": {"kind": "mlp", "slots": 5, "hidden": [10]}}[kind]
    cfg = FUNCTION.corpus_config({})
    torch.manual_seed(1)
    network = FUNCTION.student(cfg, settings)
    network.normalizer.learn(report(40, 20))
    signature = FUNCTION.student_signature(cfg, settings, 1000.0)
    module = FUNCTION.deployable(network, CALIBRATION)
    export_onnx(module, signature, tmp_path / "link.onnx", {})
    run = parity.onnx_runner(tmp_path / "link.onnx")
    features = {name: v.numpy() for name, v in report(20, 30, 4).items()}
    calls = FUNCTION.calls(features, signature, run)
    assert {name: values.shape[1:] for name, values in calls.items()} == {spec.name: spec.shape for spec in signature.inputs}
    assert np.abs(calls["state"]).max() > 0.01
    assert parity.parity(parity.torch_runner(module, signature), run, calls).max_abs < parity.ONNX_MAX_ABS
    form = c_export.generate_all({"link": tmp_path / "link.onnx"}, tmp_path)["link"]
    if c_export.compiler() is None:
        assert "no C compiler" in form.reason
        return
    assert form.source is not None, form.reason
    library = c_export.build_shared(form.source, tmp_path)
    assert parity.parity(run, c_export.CModel(library, signature), calls).max_abs < parity.C_MAX_ABS


def test_an_unknown_network_is_said():
    with pytest.raises(RankdError, match="kind 'tree' is unknown; expected one of gru, mlp"):
        FUNCTION.student(FUNCTION.corpus_config({}), {"kind": "tree"})
    with pytest.raises(RankdError, match="at least 2 slots"):
        FUNCTION.student(FUNCTION.corpus_config({}), {"kind": "mlp", "slots": 1})
