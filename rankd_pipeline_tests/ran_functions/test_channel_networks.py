"""WiFo's networks: parameter counts of the published table, places, padding, and what they show of their inside."""

import numpy as np
import pytest
import torch

from rankd_pipeline.errors import RankdError
from rankd_pipeline.ran_functions.channel_prediction.alignment import aligned, mirrored
from rankd_pipeline.ran_functions.channel_prediction.networks import (
    SIZES,
    Deployable,
    MaskedChannelTransformer,
    Place,
    masked_transformer,
)
from rankd_pipeline.ran_functions.channel_prediction.patches import coordinates, network_inputs, patchify, unpatchify
from rankd_pipeline.ran_functions.channel_prediction.runs import (
    LOADING,
    bounded,
    cleaned,
    continued,
    lines_of,
    patches_of,
    planes_of,
    products_of,
    way_on,
)

# WiFo's count of all tensors, and Tiny-WiFo's versions; it holds 172 x width numbers of unused place tables.
PUBLISHED = {
    "tiny": 366_784, "little": 1_396_992, "small": 5_448_064, "base": 21_512_832, "large": 85_978_496,
    "tiny-wifo": 5_448_064, "tiny-wifo-v1": 2_812_544, "tiny-wifo-v2": 1_396_992, "tiny-wifo-v3": 734_592,
}  # fmt: skip


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_exactly_the_published_ones(size):
    with torch.device("meta"):
        network = masked_transformer(size)
    assert count(network) == PUBLISHED[size] - 172 * SIZES[size]["width"]


@pytest.mark.parametrize(("width", "encoder", "decoder"), [(256, 6, 4), (32, 3, 2), (128, 1, 1)])
def test_the_closed_form(width, encoder, decoder):
    with torch.device("meta"):
        network = MaskedChannelTransformer(width=width, encoder_depth=encoder, decoder_depth=decoder)
    assert count(network) == (encoder + decoder) * (8 * width**2 + 11 * width) + width**2 + 263 * width + 128


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(RankdError, match="tiny, little, small"):
        masked_transformer("huge")


@pytest.mark.parametrize(
    ("width", "parts"),
    [(64, (22, 22, 20)), (128, (42, 42, 44)), (256, (86, 86, 84)), (512, (170, 170, 172)), (768, (256, 256, 256))],
)
def test_places_have_the_published_parts(width, parts):
    place = Place(width)
    assert place.parts == parts
    at = torch.tensor([[[3, 0, 5]]])
    half = parts[0] // 2
    rates = 10000.0 ** (-np.arange(half) / half)
    found = place(at)[0, 0].numpy()
    assert np.allclose(found[:half], np.sin(3 * rates), atol=1e-6)
    assert np.allclose(found[half : parts[0]], np.cos(3 * rates), atol=1e-6)
    assert np.allclose(found[parts[0] + parts[1] // 2 : 2 * parts[0]], 1.0)  # antenna 0: all cosines are one


def example(n: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    csi = rng.standard_normal((n, 16, 128)).astype(np.float32)
    grid = np.tile(np.array([2, 2, 4], np.int16), (n, 1))
    grid[-1] = (2, 2, 2)
    csi[-1, 8:] = 0
    return csi, grid, np.array(["time", "frequency", "time"][:n])


def test_a_padded_row_gets_what_it_gets_alone_and_zeros_behind():
    torch.manual_seed(0)
    network = MaskedChannelTransformer(width=32, encoder_depth=2, decoder_depth=1).eval()
    csi, grid, task = example()
    together = network_inputs(csi, grid, task)
    with torch.no_grad():
        whole = network(**{name: torch.from_numpy(v) for name, v in together.items()})
        for row in range(3):
            alone = network_inputs(csi[row : row + 1], grid[row : row + 1], task[row : row + 1])
            single = network(**{name: torch.from_numpy(v) for name, v in alone.items()})
            assert torch.allclose(whole[row, : single.shape[1]], single[0], atol=1e-5)
            assert not whole[row, single.shape[1] :].any()


def test_the_order_of_patches_does_not_matter_their_places_do():
    torch.manual_seed(0)
    network = MaskedChannelTransformer(width=32, encoder_depth=2, decoder_depth=1).eval()
    inputs = {name: torch.from_numpy(v[:1]) for name, v in network_inputs(*example()).items()}
    order = torch.randperm(inputs["visible_at"].shape[1], generator=torch.Generator().manual_seed(1))
    turned = {**inputs, "visible_patches": inputs["visible_patches"][:, order], "visible_at": inputs["visible_at"][:, order]}
    with torch.no_grad():
        assert torch.allclose(network(**inputs), network(**turned), atol=1e-5)
        moved = {**inputs, "visible_at": inputs["visible_at"][:, order]}
        assert not torch.allclose(network(**inputs), network(**moved), atol=1e-3)


def test_internals_show_the_same_pass():
    torch.manual_seed(0)
    network = MaskedChannelTransformer(width=32, encoder_depth=2, decoder_depth=1)
    csi, grid, task = (values[:2] for values in example())
    task = np.array(["time", "time"])
    view = {name: torch.from_numpy(v) for name, v in network_inputs(csi, grid, task).items()}
    view["label"] = torch.randn(2, view["wanted_at"].shape[1], 128)
    found = network.internals(view)
    assert torch.allclose(found.output, network(**{k: v for k, v in view.items() if k != "label"}), atol=1e-5)
    assert [m.shape for m in found.attention["encoder"]] == [(2, 8, 8, 8)] * 2
    assert [m.shape for m in found.attention["decoder"]] == [(2, 8, 16, 16)]
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for maps in found.attention.values() for m in maps)
    assert {name: tuple(x.shape[1:]) for name, x in found.features.items()} == {
        "embedding": (16, 32), "encoder": (8, 32), "decoder": (16, 32)}  # fmt: skip
    assert network.feature_widths == {name: x.shape[-1] for name, x in found.features.items()}


def two_channels():
    """Two complex channels [2, T, N, K] of 8 instants, 4 antennas and 16 subcarriers."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((2, 8, 4, 16)) + 1j * rng.standard_normal((2, 8, 4, 16)) + 3.0
    return h.astype(np.complex64)


def asked(h, task):
    grids = np.tile(np.array([2, 1, 4], np.int16), (len(h), 1))
    inputs = network_inputs(patchify(h), grids, np.full(len(h), task))
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


@pytest.mark.parametrize("task", ["time", "frequency"])
def test_an_aligned_network_turns_with_its_channel(task):
    """Another Doppler, delay, angle, phase and power of all paths: the prediction follows exactly."""
    torch.manual_seed(0)
    network = MaskedChannelTransformer(width=32, encoder_depth=1, decoder_depth=1, align=True).eval()
    torch.nn.init.xavier_uniform_(network.head.weight)  # as if it had learned something
    h = two_channels()
    t, a, k = np.ogrid[:8, :4, :16]
    ramp = 2.5 * np.exp(1j * (0.9 * t - 0.4 * a + 1.7 * k + 0.3)).astype(np.complex64)
    hidden = patchify(np.broadcast_to(ramp, h.shape))[
        :, coordinates((2, 1, 4))[:, 0 if task == "time" else 2] >= (1 if task == "time" else 2)
    ]
    with torch.no_grad():
        plain, turned = (network(**asked(x, task)).numpy() for x in (h, h * ramp))
    by_hand = plain.view(np.complex64) * np.ascontiguousarray(hidden).view(np.complex64)
    assert np.allclose(turned.view(np.complex64), by_hand, rtol=1e-3, atol=1e-3)


def test_samples_of_both_tasks_in_a_batch_get_what_each_gets_alone():
    """Each is run on over an axis of its own."""
    torch.manual_seed(0)
    network = MaskedChannelTransformer(width=32, encoder_depth=1, decoder_depth=1, align=True).eval()
    torch.nn.init.xavier_uniform_(network.head.weight)
    h = np.concatenate([two_channels()[:, :, :, :8], two_channels()[:, :, :, 8:]])
    tasks, grids = np.array(["time", "frequency", "frequency", "time"]), np.tile(np.array([2, 1, 2], np.int16), (4, 1))
    inputs = {name: torch.from_numpy(values) for name, values in network_inputs(patchify(h), grids, tasks).items()}
    with torch.no_grad():
        together = network(**inputs)
        alone = [network(**{name: values[row : row + 1] for name, values in inputs.items()}) for row in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    over_time = way_on(inputs["visible_at"], inputs["wanted_at"]).over_time_B11.flatten()
    assert over_time.tolist() == [True, False, False, True]


def test_a_lone_path_is_the_same_to_every_aligned_network():
    """What is left of one path behind the turn is a one: whatever its Doppler, delay, angle and power."""
    t, a, k = np.ogrid[:8, :4, :16]
    h = np.stack([0.2 * np.exp(1j * (0.1 * t + 2.0 * a - 1.1 * k)), 3.0 * np.exp(1j * (-2.2 * t + 0.7 * k + 1.0 + 0 * a))])
    inputs = asked(h.astype(np.complex64), "time")
    at, received = inputs["visible_at"], inputs["visible_patches"]
    own = aligned(received, at, at, 0.01)
    seen, turn = own.patches_BLE[:, : at.shape[1]], own.turn
    assert np.allclose(np.ascontiguousarray(seen.numpy()).view(np.complex64), 1.0, atol=1e-4)
    assert np.allclose(turn.step_B3.numpy(), [[0.1, 2.0, -1.1], [-2.2, 0.0, 0.7]], atol=1e-4)
    assert np.allclose(turn.back(seen).numpy(), received.numpy(), atol=1e-4)
    assert np.allclose(turn.into(turn.back(seen)).numpy(), seen.numpy(), atol=1e-4)


def test_a_path_that_changes_its_sign_from_entry_to_entry_is_turned_too():
    """Half a turn a step is where an arctangent has its jump; the mean product is real and negative, or nearly so."""
    t, a, k = np.ogrid[:8, :4, :16]
    sign = ((-1.0) ** (t + k) + 0 * a).astype(np.complex64)
    h = np.stack([sign, sign * np.exp(1e-4j * (t - k)), sign * np.exp(-1e-4j * (t + k))]).astype(np.complex64)
    inputs = asked(h, "time")
    own = aligned(inputs["visible_patches"], inputs["visible_at"], inputs["visible_at"], 0.01)
    seen = own.patches_BLE[:, : inputs["visible_at"].shape[1]].numpy()
    assert np.allclose(np.ascontiguousarray(seen).view(np.complex64), 1.0, atol=1e-4)


def test_nothing_gets_larger_than_what_was_seen_and_keeps_its_phase():
    torch.manual_seed(0)
    patches = torch.cat([torch.randn(3, 2, 128), 5.0 * torch.randn(3, 2, 128)], dim=1)
    found = patches_of(bounded(planes_of(patches), 2))
    before, after = (np.ascontiguousarray(x.numpy()).view(np.complex64) for x in (patches, found))
    largest = np.abs(before[:, :2]).max(axis=(1, 2), keepdims=True)
    assert np.array_equal(after[:, :2], before[:, :2]) and (np.abs(before) > largest).any()
    assert np.allclose(np.abs(after), np.minimum(np.abs(before), largest), rtol=1e-5)
    assert np.allclose(after / np.abs(after), before / np.abs(before), atol=1e-5)


def lines_over(task, patches):
    """Lines along time, or along frequency, as a run takes them."""
    return lines_of(patches)[0 if task == "time" else 2].reshape(len(patches), -1, 128)


def way_over(task, grid, n):
    """The way from the first half of a grid to the second."""
    at = torch.as_tensor(coordinates(grid)).float().expand(n, -1, -1)
    seen = at[0, :, 0 if task == "time" else 2] < grid[0 if task == "time" else 2] // 2
    return way_on(at[:, seen], at[:, ~seen]), seen


def noisy_paths(rng, noise=0.01):
    """A channel [3, 8, 8, 8] of four paths each and unit power, and the same with white noise, as patches."""
    t, a, k = np.ogrid[:8, :8, :8]
    h = sum(
        np.exp(2j * np.pi * rng.random((3, 1, 1, 1)))
        * np.exp(1j * sum(rng.uniform(-0.4, 0.4, (3, 1, 1, 1)) * axis for axis in (t, a, k)))
        for _ in range(4)
    )
    h = h / np.sqrt((np.abs(h) ** 2).mean(axis=(1, 2, 3), keepdims=True))
    white = (rng.standard_normal(h.shape) + 1j * rng.standard_normal(h.shape)) * np.sqrt(noise / 2)
    return (torch.from_numpy(patchify(x.astype(np.complex64))) for x in (h, h + white))


@pytest.mark.parametrize(("task", "axes"), [("time", (3, 4)), ("frequency", (2, 3))])
def test_cleaning_is_the_wiener_filter_across_the_run(task, axes):
    """Over time: along antennas and subcarriers, written out with complex matrices; over frequency: time and antennas."""
    rng, noise = np.random.default_rng(2), 0.02
    _, received = noisy_paths(rng, noise)
    received = received / received.square().mean(dim=(1, 2), keepdim=True).mul(2).sqrt()
    lines = lines_of(received)
    found = cleaned(way_over(task, (2, 2, 2), 3)[0], lines, products_of(lines), noise)
    x = received.numpy().view(np.complex64).reshape(3, 8, 4, 4, 4)  # sample, patch, time, antenna, subcarrier
    expected = x
    for axis in axes:
        lines = np.moveaxis(x, axis, -1).reshape(3, -1, 4)
        covariance = np.einsum("bni,bnj->bij", lines.conj(), lines) / lines.shape[1] + LOADING * noise * np.eye(4)
        weights = np.eye(4) - noise * np.linalg.inv(covariance)
        expected = np.moveaxis(np.einsum("b...i,bij->b...j", np.moveaxis(expected, axis, -1), weights), -1, axis)
    patches = np.ascontiguousarray(expected.reshape(3, 8, 64)).astype(np.complex64).view(np.float32)
    assert np.allclose(found.numpy(), lines_over(task, torch.from_numpy(patches)).numpy(), atol=1e-3)


@pytest.mark.parametrize("task", ["time", "frequency"])
def test_cleaning_takes_noise_out_of_few_paths(task):
    clean, received = noisy_paths(np.random.default_rng(3))
    before = (received - clean).square().mean()
    lines = lines_of(received)
    found = cleaned(way_over(task, (2, 2, 2), 3)[0], lines, products_of(lines), 0.01)
    assert (found - lines_over(task, clean)).square().mean() < 0.7 * before


@pytest.mark.parametrize("task", ["time", "frequency"])
def test_three_paths_are_continued(task):
    """A sum of three exponentials obeys a recursion of order three, so its run has one answer."""
    rng = np.random.default_rng(1)
    t, a, k = np.ogrid[:16, :4, :16]
    h = np.zeros((2, 16, 4, 16), complex)
    for doppler, delay in ((0.3, -0.2), (-1.1, 0.9), (1.9, -1.5)):
        gains = rng.standard_normal((2, 1, 4, 1)) + 1j * rng.standard_normal((2, 1, 4, 1))
        h += gains * np.exp(1j * (doppler * t + delay * k))
    h /= np.sqrt(np.mean(np.abs(h) ** 2))
    patches = torch.from_numpy(patchify(h.astype(np.complex64)))
    way, seen = way_over(task, (4, 1, 4), 2)
    found, moves = continued(way, lines_over(task, patches[:, seen]), ridge=1e-6)
    assert moves.all()
    found, true, known = (np.ascontiguousarray(x.numpy()).view(np.complex64) for x in (found, patches[:, ~seen], patches[:, seen]))
    bounded = np.abs(true) <= np.abs(known).max(axis=(1, 2), keepdims=True)
    assert bounded.mean() > 0.9 and np.allclose(found[bounded], true[bounded], atol=0.02)


def test_where_no_pair_of_patches_leads_the_nearest_is_repeated():
    patches, at = torch.randn(1, 2, 128), torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    wanted = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]]])
    way = way_on(at, wanted)
    _, moves = continued(way, lines_over("time", patches))
    assert not moves.any() and torch.equal(way.near_BMV @ patches, patches[:, [0, 1, 0]])
    own = aligned(patches, at, wanted, 0.01)
    found = own.patches_BLE
    assert torch.equal(found[:, 2:], found[:, [0, 1, 0]]) and not torch.allclose(own.turn.back(found[:, 2:]), patches[:, [0, 1, 0]])


def test_mirrored_channels_are_those_that_might_have_been():
    torch.manual_seed(0)
    h = two_channels()
    found = unpatchify(mirrored(torch.from_numpy(patchify(np.repeat(h[:1], 64, 0))), (2, 1, 4)).numpy(), (2, 1, 4))
    ways = [h[0][::i, ::j, ::k] if k == 1 else h[0][::i, ::j, ::k].conj() for i in (1, -1) for j in (1, -1) for k in (1, -1)]
    which = [[bool(np.allclose(x, way, atol=1e-6)) for way in ways].index(True) for x in found]
    assert set(which) == set(range(8))


def test_the_deployed_graph_says_its_interval():
    network = MaskedChannelTransformer(width=32, encoder_depth=1, decoder_depth=1)
    inputs = {name: torch.from_numpy(v[:2]) for name, v in network_inputs(*example()).items()}
    channel, half_width = Deployable(network, 0.25).eval()(*inputs.values())
    assert channel.shape == (2, 8, 128) and half_width.tolist() == [[0.25], [0.25]]
