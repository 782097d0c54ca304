# SPDX-License-Identifier: Apache-2.0
"""The contract of engines, obeyed by the engine for devices on a twin.

What is left out, no plan can do: text, inputs with defaults, ranks that nobody knows before a run,
and the check of an index before it is used.
"""

from engines.test_engine_contract import (
    test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing,
    test_a_constant_result_is_not_the_weights,
    test_eight_threads_share_one_engine,
    test_large_results_of_every_numeric_type_are_written_into_the_callers_array,
    test_only_wanted_outputs_come_back,
    test_read_only_inputs_are_accepted,
    test_results_outlive_the_engine,
    test_small_results_come_in_the_callers_array_or_another,
)
from engines.test_engine_failures import (
    test_an_array_that_does_not_fit_is_refused_and_untouched,
    test_what_does_not_fit_the_model_is_an_engine_error,
)

__all__ = [
    "test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing",
    "test_a_constant_result_is_not_the_weights",
    "test_an_array_that_does_not_fit_is_refused_and_untouched",
    "test_eight_threads_share_one_engine",
    "test_large_results_of_every_numeric_type_are_written_into_the_callers_array",
    "test_only_wanted_outputs_come_back",
    "test_read_only_inputs_are_accepted",
    "test_results_outlive_the_engine",
    "test_small_results_come_in_the_callers_array_or_another",
    "test_what_does_not_fit_the_model_is_an_engine_error",
]
