/* Evolutionary search: never worse than its start, within the budget, the same answer for the same seed, and after an interruption too. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/plan.h>

#include "base/file.h"
#include "pipeline_model.h"
#include "st_file.h"

enum { N = 12, CHOICES = 5 };

static aq_plan_choice choices[N][CHOICES];
static aq_plan_item items[N];
static aq_plan_problem problem;

static void make_problem(void) {
    static const char *const names[N] = {"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"};
    problem = (aq_plan_problem){.items = items, .n_items = N, .other_bytes = 100};
    for (size_t i = 0; i < N; i++) {
        for (size_t c = 0; c < CHOICES; c++)
            choices[i][c] = (aq_plan_choice){.bits = 4, .bytes = (i + 1) * 100 * (c + 1), .error = pow(0.25, (double)c) * (double)(1 + i % 3)};
        items[i] = (aq_plan_item){.name = names[i], .weight = 1, .sensitivity = (double)NAN, .choices = choices[i], .n_choices = CHOICES};
    }
}

static uint64_t middle(void) {
    uint64_t low, high;
    aq_plan_extremes(&problem, &low, &high);
    return (low + high) / 2;
}

/* What the model really suffers: errors of neighbours multiply, so that the sum of errors leads astray. */
typedef struct {
    size_t n_calls, stop_after;
    uint32_t generations;
    double best;
    bool monotone;
} watcher;

static bool true_fitness(void *user, const aq_plan_problem *p, const size_t *choice, double *out) {
    watcher *w = user;
    if (w->n_calls++ == w->stop_after) return false;
    *out = 0;
    for (size_t i = 0; i < p->n_items; i++) {
        double a = p->items[i].choices[choice[i]].error, b = p->items[(i + 1) % p->n_items].choices[choice[(i + 1) % p->n_items]].error;
        *out += a * b * (1 + 5 * (i == 3));
    }
    return true;
}

static bool watch(void *user, uint32_t generation, double best, double mean, double worst, uint64_t n_evaluations) {
    watcher *w = user;
    (void)n_evaluations;
    w->monotone &= (generation == 0 || best <= w->best) && best <= mean && mean <= worst;
    w->best = best;
    w->generations++;
    return true;
}

static aq_evolution settings(watcher *w) {
    *w = (watcher){.stop_after = SIZE_MAX, .monotone = true};
    aq_evolution e;
    aq_evolution_init(&e);
    e.generations = 15;
    e.max_evaluations = 0;
    e.seed = 7;
    e.fitness = true_fitness;
    e.generation = watch;
    e.user = w;
    return e;
}

static void start_of(size_t *choice) { assert_int_equal(aq_plan_choose(&problem, middle(), choice, NULL, NULL), AQ_OK); }

static void it_improves_on_its_start_within_the_budget(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    size_t choice[N];
    double start, found;
    start_of(choice);
    true_fitness(&w, &problem, choice, &start);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, &found, NULL, NULL), AQ_OK);
    assert_true(found < start);
    assert_true(w.monotone && w.generations == 16 && w.best == found);
    assert_true(aq_plan_bytes(&problem, choice) <= middle());
}

/* The knapsack's answer is the optimum of its own measure: evolution by the same measure cannot be better, and must not be worse. */
static void by_the_sum_of_errors_the_start_stays(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    e.fitness = NULL;
    size_t choice[N], before[N];
    double found;
    start_of(choice);
    memcpy(before, choice, sizeof before);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, &found, NULL, NULL), AQ_OK);
    assert_true(found == aq_plan_error(&problem, before));
}

static void the_same_seed_gives_the_same_answer(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    size_t a[N], b[N];
    double fa, fb;
    start_of(a);
    start_of(b);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, a, &fa, NULL, NULL), AQ_OK);
    size_t calls = w.n_calls;
    e = settings(&w);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, b, &fb, NULL, NULL), AQ_OK);
    assert_memory_equal(a, b, sizeof a);
    assert_true(fa == fb && calls == w.n_calls);
}

static void an_interrupted_search_ends_as_an_uninterrupted_one(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    size_t whole[N], parts[N];
    double fw, fp;
    start_of(whole);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, whole, &fw, NULL, NULL), AQ_OK);
    char *path = strdup(st_path("state.json"));
    for (size_t stop = 5; stop <= 85; stop += 20) { /* in the first generation, and in later ones */
        e = settings(&w);
        e.state_path = path;
        w.stop_after = stop;
        start_of(parts);
        aq_error err;
        assert_int_equal(aq_plan_evolve(&problem, middle(), &e, parts, &fp, NULL, &err), AQ_ERR_INTERRUPTED);
        w.stop_after = SIZE_MAX;
        start_of(parts);
        if (aq_plan_evolve(&problem, middle(), &e, parts, &fp, NULL, &err) != AQ_OK) fail_msg("%s", err.message);
        assert_memory_equal(whole, parts, sizeof whole);
        assert_true(fw == fp);
        remove(path);
    }
    free(path);
}

static void a_state_of_another_search_is_refused(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    size_t choice[N];
    aq_error err;
    char *path = strdup(st_path("state.json"));
    e.state_path = path;
    e.generations = 2;
    start_of(choice);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, NULL, NULL, NULL), AQ_OK);
    e.seed = 8;
    start_of(choice);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, NULL, NULL, &err), AQ_ERR_FORMAT);
    assert_non_null(strstr(err.message, "another search"));
    static const char *const bad[] = {"", "{}", "[]", "{\"schema\":\"arrowquant.evolution/1\"}"};
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(aq_file_write(path, bad[i], strlen(bad[i]), NULL), AQ_OK);
        assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, NULL, NULL, &err), AQ_ERR_FORMAT);
    }
    free(path);
}

static void evaluations_are_bounded(void **state) {
    (void)state;
    make_problem();
    watcher w;
    aq_evolution e = settings(&w);
    e.max_evaluations = 33;
    size_t choice[N];
    start_of(choice);
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, NULL, NULL, NULL), AQ_OK);
    assert_true(w.n_calls == 33);
}

static bool no_number(void *user, const aq_plan_problem *p, const size_t *choice, double *out) {
    (void)user;
    (void)p;
    (void)choice;
    *out = (double)NAN;
    return true;
}

static void bad_settings_are_refused_and_NaN_is_the_worst(void **state) {
    (void)state;
    make_problem();
    watcher w;
    size_t choice[N];
    start_of(choice);
    for (int i = 0; i < 5; i++) {
        aq_evolution e = settings(&w);
        if (i == 0) e.population = 1;
        if (i == 1) e.mutation_rate = 1.5;
        if (i == 2) e.crossover_rate = (double)NAN;
        if (i == 3) e.elite_ratio = -0.1;
        if (i == 4) choice[3] = CHOICES;
        assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, NULL, NULL, NULL), AQ_ERR_USAGE);
    }
    start_of(choice);
    aq_evolution e = settings(&w);
    assert_int_equal(aq_plan_evolve(&problem, aq_plan_bytes(&problem, choice) - 1, &e, choice, NULL, NULL, NULL), AQ_ERR_USAGE);
    e.fitness = no_number;
    e.generation = NULL;
    double found;
    assert_int_equal(aq_plan_evolve(&problem, middle(), &e, choice, &found, NULL, NULL), AQ_OK);
    assert_true(isinf(found));
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, pipeline_setup, pipeline_teardown)
    const struct CMUnitTest tests[] = {
        TEST(it_improves_on_its_start_within_the_budget),         TEST(by_the_sum_of_errors_the_start_stays), TEST(the_same_seed_gives_the_same_answer),
        TEST(an_interrupted_search_ends_as_an_uninterrupted_one), TEST(a_state_of_another_search_is_refused), TEST(evaluations_are_bounded),
        TEST(bad_settings_are_refused_and_NaN_is_the_worst),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
