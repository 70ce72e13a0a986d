"""What DeepSpeed has and cannot do here is refused by its name, with the reason."""

import pytest

from pretrain.engine.offered import check_offered

CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            r"^zero_optimization\.round_robin_gradients is not offered: .*checkpoints would mix them up; leave it out$",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
            r"^zero_optimization\.stage3_module_granularity_threshold is not offered: .*backward pass fails; leave it",
        ),
        (
            {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 1, "offload_optimizer": CPU}},
            r"^zero_force_ds_cpu_optimizer must be false, or left out, found True: the optimizer is torch's",
        ),
        (
            {"zero_allow_untested_optimizer": False, "zero_optimization": {"stage": 1}},
            r"^zero_allow_untested_optimizer must be true, or left out, found False: .*none of those .* tested",
        ),
    ],
)
def test_what_would_fail_or_do_harm_later_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        check_offered(section)


def test_the_same_keys_may_say_what_holds_anyway():
    check_offered({"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True})
    check_offered({"zero_optimization": {"stage": 2, "round_robin_gradients": False}})
    check_offered({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0}})
