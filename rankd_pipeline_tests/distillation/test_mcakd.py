"""MCAKD's losses and CA-KS: what each must be on cases whose answer is known, and who gets gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankd_pipeline.distillation.caks import KnowledgeSelector, SelectionConfig, choose
from rankd_pipeline.distillation.internals import Internals
from rankd_pipeline.distillation.mcakd import Mcakd, McakdConfig, attention_loss, feature_loss, layers_followed
from rankd_pipeline.errors import RankdError

LITERAL = SelectionConfig(mode="token", ema=0, reselect_every=1, sticky=False, gradient="none")


def maps(*layers: int, tokens: int = 5) -> tuple[torch.Tensor, ...]:
    return tuple(torch.softmax(torch.randn(3, 2, tokens, tokens, generator=torch.Generator().manual_seed(i)), -1) for i in layers)


def shared(samples: int = 8, tokens: int = 24, teacher: int = 64, student: int = 32, noise: float = 0.1, loud: float = 2.0):
    """(student [B, N, d_s], teacher [B, N, d_t], the teacher dimensions that the student's are made of).

    The other dimensions are louder: a selector by magnitude would take them.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, teacher, generator=generator)
    true = torch.randperm(teacher, generator=generator)[:student]
    scale = torch.full((teacher,), loud)
    scale[true] = 1.0
    return x[..., true] + noise * torch.randn(samples, tokens, student, generator=generator), x * scale, true


def test_identical_maps_have_no_loss_whatever_their_scale():
    own = {"encoder": maps(1, 2), "decoder": maps(3)}
    scaled = {name: tuple(7.0 * m for m in layers) for name, layers in own.items()}
    assert attention_loss(own, own).abs() < 1e-6
    assert attention_loss(scaled, own).abs() < 1e-6


def test_attention_loss_is_the_mean_over_maps_summed_over_stacks():
    teacher, student = {"encoder": maps(1, 2), "decoder": maps(3)}, {"encoder": maps(4, 5), "decoder": maps(6)}
    by_hand = 0.0
    for stack in ("encoder", "decoder"):
        cosines = [
            torch.nn.functional.cosine_similarity(t[b, h].flatten(), s[b, h].flatten(), dim=0)
            for t, s in zip(teacher[stack], student[stack], strict=True) for b in range(3) for h in range(2)
        ]  # fmt: skip
        by_hand += 1.0 - float(torch.stack(cosines).mean())
    assert float(attention_loss(teacher, student)) == pytest.approx(by_hand, abs=1e-6)


def test_a_shallower_student_follows_the_last_layer_of_its_share():
    assert layers_followed(6, 3) == [1, 3, 5]
    assert layers_followed(4, 2) == [1, 3]
    assert layers_followed(6, 6) == list(range(6))
    assert layers_followed(5, 2) == [2, 4]
    teacher, student = {"encoder": maps(1, 2, 3, 4)}, {"encoder": (maps(2)[0], maps(4)[0])}
    assert attention_loss(teacher, student).abs() < 1e-6


def test_different_heads_are_refused():
    other = tuple(m[:, :1] for m in maps(1))
    with pytest.raises(RankdError, match="as many heads"):
        attention_loss({"encoder": maps(1)}, {"encoder": other})


@given(st.floats(0.1, 10))
def test_cosine_of_features_knows_no_scale_and_mse_does(scale):
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    assert feature_loss(scale * x, x).abs() < 1e-5
    assert float(feature_loss(scale * x, x, "mse")) == pytest.approx((scale - 1) ** 2 * float((x**2).mean()), rel=1e-3, abs=1e-6)


def test_choose_ranks_by_score_and_ties_by_index():
    assert choose(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 3, 2]


@given(st.lists(st.integers(0, 20), min_size=6, max_size=12), st.lists(st.integers(0, 20), min_size=6, max_size=12))
def test_what_stays_chosen_keeps_its_slot(first, second):
    size = min(len(first), len(second))
    before = choose(torch.tensor(first[:size], dtype=torch.float), 4)
    after = choose(torch.tensor(second[:size], dtype=torch.float), 4, before)
    fresh = choose(torch.tensor(second[:size], dtype=torch.float), 4)
    assert sorted(after.tolist()) == sorted(fresh.tolist())
    assert len(set(after.tolist())) == 4
    for slot, dimension in enumerate(before.tolist()):
        if dimension in fresh:
            assert after[slot] == dimension
    newcomers = [d for d in fresh.tolist() if d not in before]
    assert [d for d in after.tolist() if d not in before] == newcomers


@pytest.mark.parametrize("mode", ["channel", "token", "none", "first"])
@pytest.mark.parametrize("tokens", [9, 32])
def test_any_mode_gives_the_students_width_at_any_length(mode, tokens):
    torch.manual_seed(0)
    selector = KnowledgeSelector(64, 32, SelectionConfig(mode=mode))
    selected, align = selector(torch.randn(3, tokens, 32), torch.randn(3, tokens, 64), True)
    assert selected.shape == (3, tokens, 32) and align.ndim == 0
    assert len(set(selector.slots.tolist())) == 32


def test_selecting_is_gathering():
    student, teacher, _ = shared()
    selector = KnowledgeSelector(64, 32, SelectionConfig())
    selected, _ = selector(student, teacher, True)
    assert torch.equal(selected, teacher[..., selector.slots])  # the gate is exactly one


def test_correlation_finds_the_shared_dimensions_where_magnitude_does_not():
    student, teacher, true = shared()
    recall = {}
    for mode in ("channel", "token"):
        torch.manual_seed(0)
        selector = KnowledgeSelector(64, 32, SelectionConfig(mode=mode))
        selector(student, teacher, True)
        recall[mode] = len(set(selector.slots.tolist()) & set(true.tolist())) / 32
    assert recall["channel"] > 0.9
    assert recall["token"] < 0.5


def gradients(cfg: SelectionConfig, student: torch.Tensor, teacher: torch.Tensor, with_align: bool = True):
    torch.manual_seed(0)
    selector = KnowledgeSelector(64, 32, cfg)
    selected, align = selector(student, teacher, True)
    (feature_loss(selected, student) + (align if with_align else 0.0)).backward()
    return {name: parameter.grad for name, parameter in selector.named_parameters()}


def test_the_literal_choice_passes_no_gradient_and_the_default_passes_all():
    student, teacher, _ = shared()
    student.requires_grad_()
    assert all(grad is None for grad in gradients(LITERAL, student, teacher).values())
    for grad in gradients(SelectionConfig(), student, teacher).values():
        assert grad is not None and grad.abs().sum() > 0
    without = gradients(SelectionConfig(), student, teacher, with_align=False)
    assert without["value.weight"] is None or without["value.weight"].abs().sum() == 0
    assert without["query.weight"].abs().sum() > 0


def test_neither_alignment_nor_the_teacher_is_reached_by_gradients():
    student, teacher, _ = shared()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    _, align = KnowledgeSelector(64, 32, SelectionConfig())(student, teacher, True)
    align.backward()
    assert student.grad is None and teacher.grad is None


def test_running_scores_hold_the_choice_against_one_odd_batch():
    student, teacher, true = shared()
    odd_student, odd_teacher = torch.randn_like(student), torch.randn_like(teacher)
    kept = {}
    for ema in (0.9, 0.0):
        selector = KnowledgeSelector(64, 32, SelectionConfig(ema=ema))
        for _ in range(3):
            selector(student, teacher, True)
        selector(odd_student, odd_teacher, True)
        kept[ema] = len(set(selector.slots.tolist()) & set(true.tolist())) / 32
    assert kept[0.9] > 0.9 > kept[0.0]


def test_between_choices_the_slots_stand_still():
    student, teacher, _ = shared()
    selector = KnowledgeSelector(64, 32, SelectionConfig())
    selector(student, teacher, True)
    before = selector.slots.clone()
    for seed in range(5):
        torch.manual_seed(seed)
        selector(torch.randn_like(student), torch.randn_like(teacher), False)
    assert torch.equal(selector.slots, before)


def test_a_part_of_weight_zero_has_no_selector_and_no_say():
    widths = ({"embedding": 64, "encoder": 64, "decoder": 64}, {"embedding": 32, "encoder": 32, "decoder": 32})
    loss = Mcakd(*widths, McakdConfig(embedding=0.0, attention=0.0, align=0.0))
    assert set(loss.selectors) == {"encoder", "decoder"}
    features = {name: torch.randn(2, 6, 32) for name in widths[1]}
    teacher = Internals(torch.zeros(1), {"encoder": maps(1)}, {name: torch.randn(2, 6, 64) for name in widths[0]})
    student = Internals(torch.zeros(1), {"encoder": maps(2)}, features)
    one = loss(teacher, student, True)
    features["embedding"] = torch.randn(2, 6, 32)
    assert torch.equal(one, loss(teacher, student, False))
    assert set(loss.selection()) == {"encoder", "decoder"}
