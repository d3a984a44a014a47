/* One candidate per layer under a budget: against brute force, monotone in the budget, reproducible. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>

#include "base/mem.h"

enum { MOST_ITEMS = 1000, MOST_CHOICES = 12 };

typedef struct {
    aq_plan_problem problem;
    aq_plan_item items[MOST_ITEMS];
    aq_plan_choice choices[MOST_ITEMS][MOST_CHOICES];
    char names[MOST_ITEMS][16];
} sample;

static uint64_t next(uint64_t *seed) {
    *seed = *seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return *seed >> 33;
}

static double uniform(uint64_t *seed) { return (double)next(seed) / 2147483648.0; }

/* Layers of different sizes and slopes; errors fall with size by about 6 dB a bit, with noise, so that some candidates are dominated and the hull has gaps. */
static sample *make(size_t n_items, size_t n_choices, uint64_t seed) {
    sample *s = aq_calloc(1, sizeof *s);
    assert_non_null(s);
    s->problem = (aq_plan_problem){.items = s->items, .n_items = n_items, .other_bytes = 1000 + next(&seed) % 1000};
    for (size_t i = 0; i < n_items; i++) {
        double values = 1000.0 * (1 + (double)(next(&seed) % 20)), level = pow(10, -2 * uniform(&seed));
        for (size_t c = 0; c < n_choices; c++) {
            double bits = 2 + 6.5 * (double)c / (double)n_choices + 0.5 * uniform(&seed);
            s->choices[i][c] = (aq_plan_choice){.bits = 4,
                                                .spec = {.bits = 4, .group_size = 64, .axis = 1, .method = AQ_METHOD_SEARCH},
                                                .bytes = (uint64_t)(values * bits / 8),
                                                .error = level * pow(4, -bits) * (0.5 + uniform(&seed)),
                                                .cosine = (double)NAN};
        }
        s->names[i][0] = (char)('a' + (int)(i % 26));
        s->names[i][1] = (char)('a' + (int)(i / 26 % 26));
        s->names[i][2] = (char)('a' + (int)(i / 676));
        s->items[i] =
            (aq_plan_item){.name = s->names[i], .weight = 0.1 + uniform(&seed), .sensitivity = (double)NAN, .choices = s->choices[i], .n_choices = n_choices};
    }
    return s;
}

static double brute_force(const aq_plan_problem *p, uint64_t budget) {
    size_t choice[8] = {0};
    double best = INFINITY;
    for (;;) {
        if (aq_plan_bytes(p, choice) <= budget && aq_plan_error(p, choice) < best) best = aq_plan_error(p, choice);
        size_t i = 0;
        while (i < p->n_items && ++choice[i] == p->items[i].n_choices) choice[i++] = 0;
        if (i == p->n_items) return best;
    }
}

static double solve(const aq_plan_problem *p, uint64_t budget, size_t *choice) {
    aq_error err;
    if (aq_plan_choose(p, budget, choice, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
    assert_true(budget == 0 || aq_plan_bytes(p, choice) <= budget);
    return aq_plan_error(p, choice);
}

static void small_problems_are_solved_as_by_brute_force(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 60; seed++) {
        sample *s = make(2 + seed % 5, 2 + seed % 4, seed);
        uint64_t low, high;
        aq_plan_extremes(&s->problem, &low, &high);
        for (uint64_t k = 0; k <= 16; k++) {
            uint64_t budget = low + (high - low) * k / 16;
            size_t choice[8];
            double found = solve(&s->problem, budget, choice), best = brute_force(&s->problem, budget);
            if (fabs(found - best) > 1e-12 * best)
                fail_msg("seed %llu, budget %llu: %g, optimum %g", (unsigned long long)seed, (unsigned long long)budget, found, best);
        }
        aq_free(s);
    }
}

static void check_monotone(const sample *s, uint64_t n_budgets) {
    static size_t choice[MOST_ITEMS];
    uint64_t low, high;
    aq_plan_extremes(&s->problem, &low, &high);
    double last = INFINITY;
    for (uint64_t k = 0; k <= n_budgets; k++) {
        double error = solve(&s->problem, low + (high - low) * k / n_budgets, choice);
        if (error > last * (1 + 1e-12)) fail_msg("error rises from %g to %g at step %llu", last, error, (unsigned long long)k);
        last = error;
    }
    assert_true(fabs(last - solve(&s->problem, 0, choice)) <= 1e-12 * last);
}

static void the_error_never_rises_with_the_budget(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        sample *s = make(5 + 7 * seed, MOST_CHOICES, seed);
        check_monotone(s, 120);
        aq_free(s);
    }
    sample *large = make(MOST_ITEMS, MOST_CHOICES, 99);
    check_monotone(large, 6);
    aq_free(large);
}

/* With many layers there is always a finer choice. */
static void the_budget_is_used(void **state) {
    (void)state;
    static size_t choice[MOST_ITEMS];
    for (uint64_t seed = 1; seed <= 5; seed++) {
        sample *s = make(40, MOST_CHOICES, seed);
        uint64_t low, high;
        aq_plan_extremes(&s->problem, &low, &high);
        for (uint64_t k = 0; k < 20; k++) {
            uint64_t budget = low + (high - low) * k / 25;
            solve(&s->problem, budget, choice);
            assert_true((double)aq_plan_bytes(&s->problem, choice) >= 0.97 * (double)budget);
        }
        aq_free(s);
    }
}

static void an_impossible_budget_tells_the_smallest_size(void **state) {
    (void)state;
    sample *s = make(10, 4, 3);
    uint64_t low, high, minimum;
    size_t choice[10];
    aq_error err;
    char number[32];
    aq_plan_extremes(&s->problem, &low, &high);
    assert_int_equal(aq_plan_choose(&s->problem, low - 1, choice, &minimum, &err), AQ_ERR_BUDGET);
    assert_int_equal(minimum, low);
    snprintf(number, sizeof number, "%llu bytes", (unsigned long long)low);
    assert_non_null(strstr(err.message, number));
    assert_int_equal(aq_plan_choose(&s->problem, low, choice, NULL, &err), AQ_OK);
    assert_int_equal(aq_plan_bytes(&s->problem, choice), low);
    aq_free(s);
}

static void the_same_problem_gives_the_same_choice(void **state) {
    (void)state;
    static size_t a[MOST_ITEMS], b[MOST_ITEMS];
    sample *s = make(300, MOST_CHOICES, 5);
    uint64_t low, high;
    aq_plan_extremes(&s->problem, &low, &high);
    solve(&s->problem, (low + high) / 2, a);
    solve(&s->problem, (low + high) / 2, b);
    assert_memory_equal(a, b, 300 * sizeof *a);
    aq_free(s);
}

/* A layer that is fixed has one candidate; layers of weight 0 take the smallest. */
static void layers_without_a_choice_or_a_weight_are_fine(void **state) {
    (void)state;
    sample *s = make(3, 4, 8);
    size_t choice[3];
    s->items[1].n_choices = 1;
    s->items[2].weight = 0;
    solve(&s->problem, 0, choice);
    assert_int_equal(choice[1], 0);
    for (size_t c = 0; c < 4; c++) assert_true(s->choices[2][choice[2]].bytes <= s->choices[2][c].bytes);
    aq_plan_problem none = {.other_bytes = 10};
    assert_int_equal(aq_plan_choose(&none, 10, choice, NULL, NULL), AQ_OK);
    assert_int_equal(aq_plan_choose(&none, 9, choice, NULL, NULL), AQ_ERR_BUDGET);
    aq_free(s);
}

static void figures_that_are_none_are_refused(void **state) {
    (void)state;
    sample *s = make(3, 4, 8);
    size_t choice[3];
    aq_error err;
    s->choices[1][2].error = (double)NAN;
    assert_int_equal(aq_plan_choose(&s->problem, 0, choice, NULL, &err), AQ_ERR_USAGE);
    assert_non_null(strstr(err.message, s->names[1]));
    s->choices[1][2].error = 0;
    s->items[0].weight = -1;
    assert_int_equal(aq_plan_choose(&s->problem, 0, choice, NULL, &err), AQ_ERR_USAGE);
    s->items[0].weight = 1;
    s->items[2].n_choices = 0;
    assert_int_equal(aq_plan_choose(&s->problem, 0, choice, NULL, &err), AQ_ERR_USAGE);
    aq_free(s);
}

static void a_choice_becomes_a_plan(void **state) {
    (void)state;
    sample *s = make(3, 4, 8);
    size_t choice[3] = {0, 1, 2};
    aq_plan *plan;
    s->choices[2][2].bits = 16;
    assert_int_equal(aq_plan_of_choice(&plan, &s->problem, choice, NULL), AQ_OK);
    const aq_plan_layer *l = aq_plan_layer_at(plan, 1);
    assert_string_equal(l->name, s->names[1]);
    assert_true(l->bits == 4 && l->group_size == 64 && l->error == s->choices[1][1].error && l->size_bytes == s->choices[1][1].bytes);
    assert_string_equal(l->params, "f16");
    assert_string_equal(l->method, "search");
    l = aq_plan_layer_at(plan, 2);
    assert_true(l->bits == 16 && l->group_size == -1 && !l->params && !l->method);
    aq_plan_free(plan);
    aq_free(s);
}

static void FA07_every_allocation_may_fail(void **state) {
    (void)state;
    sample *s = make(6, 5, 2);
    uint64_t low, high;
    size_t choice[6];
    aq_plan_extremes(&s->problem, &low, &high);
    int failures = 0;
    for (int64_t n = 0;; n++) {
        aq_mem_fail_after(n);
        aq_status status = aq_plan_choose(&s->problem, (low + high) / 2, choice, NULL, NULL);
        aq_mem_fail_after(-1);
        if (status == AQ_OK) break;
        assert_int_equal(status, AQ_ERR_MEMORY);
        failures++;
    }
    assert_true(failures > 5);
    aq_free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_problems_are_solved_as_by_brute_force),
        cmocka_unit_test(the_error_never_rises_with_the_budget),
        cmocka_unit_test(the_budget_is_used),
        cmocka_unit_test(an_impossible_budget_tells_the_smallest_size),
        cmocka_unit_test(the_same_problem_gives_the_same_choice),
        cmocka_unit_test(layers_without_a_choice_or_a_weight_are_fine),
        cmocka_unit_test(figures_that_are_none_are_refused),
        cmocka_unit_test(a_choice_becomes_a_plan),
        cmocka_unit_test(FA07_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
