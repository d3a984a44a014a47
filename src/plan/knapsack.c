/* One candidate per layer under a size budget: the multiple-choice knapsack (algorithms 7; Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11).
 *
 * Corners: on the lower convex hull of each layer's (size, cost) points every step to a larger candidate has a rate, cost saved per byte. Taking the steps of
 * all layers by falling rate walks through the corners H_0, H_1, … of the relaxed problem: each H_j is optimal for its own size. A budget lies between the
 * sizes of two corners j and j + 1.
 * Gap: from H_j, let λ be the rate of the next step. A selection of size s costs cost(H_j) - λ (s - size(H_j)) + R, where R >= 0 is the sum of its candidates'
 * reduced costs. So only selections with R < cost(H_j) - cost(H_{j+1}) can beat H_j inside the gap. They are listed by dynamic programming over (size, cost)
 * pairs, dominated ones dropped, and the best that fits is taken.
 * Monotone: the list depends on j alone, not on the budget, and nothing of a size below H_{j+1} costs less than H_{j+1}. Exact while the list is complete;
 * it is cut (by rules that do not look at the budget either) at MOST_STATES pairs and MOST_CORE layers.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

enum { MOST_STATES = 1 << 13, MOST_CORE = 256 };

static double cost_of(const aq_plan_item *item, size_t choice) { return item->weight * item->choices[choice].error; }

static uint64_t plus(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

double aq_plan_error(const aq_plan_problem *problem, const size_t *choice) {
    double sum = 0;
    for (size_t i = 0; i < problem->n_items; i++) sum += cost_of(&problem->items[i], choice[i]);
    return sum;
}

uint64_t aq_plan_bytes(const aq_plan_problem *problem, const size_t *choice) {
    uint64_t sum = problem->other_bytes;
    for (size_t i = 0; i < problem->n_items; i++) sum = plus(sum, problem->items[i].choices[choice[i]].bytes);
    return sum;
}

void aq_plan_extremes(const aq_plan_problem *problem, uint64_t *minimum_bytes, uint64_t *maximum_bytes) {
    *minimum_bytes = *maximum_bytes = problem->other_bytes;
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_plan_item *item = &problem->items[i];
        uint64_t least = UINT64_MAX, most = 0;
        for (size_t c = 0; c < item->n_choices; c++) {
            uint64_t bytes = item->choices[c].bytes;
            if (bytes < least) least = bytes;
            if (bytes > most) most = bytes;
        }
        *minimum_bytes = plus(*minimum_bytes, least);
        *maximum_bytes = plus(*maximum_bytes, most);
    }
}

aq_status aq_plan_problem_check(const aq_plan_problem *problem, aq_error *err) {
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_plan_item *item = &problem->items[i];
        if (item->n_choices == 0) return aq_fail_at(err, AQ_ERR_USAGE, NULL, item->name, "has no candidate");
        if (!(item->weight >= 0) || isinf(item->weight)) return aq_fail_at(err, AQ_ERR_USAGE, NULL, item->name, "has a weight that is negative or not finite");
        for (size_t c = 0; c < item->n_choices; c++)
            if (!(item->choices[c].error >= 0) || isinf(item->choices[c].error))
                return aq_fail_at(err, AQ_ERR_USAGE, NULL, item->name, "has a candidate whose error is negative or not finite");
    }
    return AQ_OK;
}

/* ---- corners ---- */

/* A candidate on the way to the hull. */
typedef struct {
    uint64_t bytes;
    double cost;
    size_t choice;
} point;

static int by_size_then_cost(const void *a, const void *b) {
    const point *p = a, *q = b;
    if (p->bytes != q->bytes) return p->bytes < q->bytes ? -1 : 1;
    if (p->cost != q->cost) return p->cost < q->cost ? -1 : 1;
    return p->choice < q->choice ? -1 : p->choice > q->choice;
}

/* Candidates of which none is both smaller (or equal) and better (or equal), by rising size. */
static size_t undominated(const aq_plan_item *item, point *out) {
    for (size_t c = 0; c < item->n_choices; c++) out[c] = (point){item->choices[c].bytes, cost_of(item, c), c};
    qsort(out, item->n_choices, sizeof *out, by_size_then_cost);
    size_t n = 0;
    for (size_t c = 0; c < item->n_choices; c++)
        if (n == 0 || out[c].cost < out[n - 1].cost) out[n++] = out[c];
    return n;
}

size_t aq_plan_undominated(const aq_plan_item *item, size_t *out) {
    point *points = aq_calloc(item->n_choices + 1, sizeof *points);
    if (!points) return 0;
    size_t n = undominated(item, points);
    for (size_t i = 0; i < n; i++) out[i] = points[i].choice;
    aq_free(points);
    return n;
}

static double rate(const point *from, const point *to) { return (from->cost - to->cost) / (double)(to->bytes - from->bytes); }

/* Of these, the ones on the lower convex hull: rates fall strictly. */
static size_t lower_hull(point *points, size_t n) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        while (m >= 2 && rate(&points[m - 2], &points[m - 1]) <= rate(&points[m - 1], &points[i])) m--;
        points[m++] = points[i];
    }
    return m;
}

typedef struct {
    double rate;
    size_t item, choice; /* the candidate that the step leads to */
    uint64_t bytes;      /* more than before */
    double saved;
} step;

static int by_falling_rate(const void *a, const void *b) {
    const step *p = a, *q = b;
    if (p->rate != q->rate) return p->rate > q->rate ? -1 : 1;
    if (p->item != q->item) return p->item < q->item ? -1 : 1;
    return p->bytes < q->bytes ? -1 : p->bytes > q->bytes; /* rates of one layer differ, so its steps are in order already */
}

/* The first corner into choice[], and all steps in order. */
static size_t list_steps(const aq_plan_problem *problem, point *points, step *steps, size_t *choice) {
    size_t n_steps = 0;
    for (size_t i = 0; i < problem->n_items; i++) {
        size_t n = lower_hull(points, undominated(&problem->items[i], points));
        choice[i] = points[0].choice;
        for (size_t c = 1; c < n; c++)
            steps[n_steps++] =
                (step){rate(&points[c - 1], &points[c]), i, points[c].choice, points[c].bytes - points[c - 1].bytes, points[c - 1].cost - points[c].cost};
    }
    qsort(steps, n_steps, sizeof *steps, by_falling_rate);
    return n_steps;
}

/* ---- the gap ---- */

/* A change of one layer, relative to the corner. */
typedef struct {
    int64_t bytes;
    double cost, reduced;
    size_t choice;
} change;

typedef struct {
    size_t item;
    change *changes; /* beside staying */
    size_t n_changes;
    double least; /* smallest reduced cost */
} core_item;

/* A selection over the first layers of the core. */
typedef struct {
    int64_t bytes;
    double cost, reduced;
    uint32_t parent; /* in the list of the layer before */
    uint32_t change; /* 0: stays, else 1 + index */
} state;

typedef struct {
    state *states;
    size_t n;
} stage;

static int by_least(const void *a, const void *b) {
    const core_item *p = a, *q = b;
    if (p->least != q->least) return p->least < q->least ? -1 : 1;
    return p->item < q->item ? -1 : p->item > q->item;
}

/* Layers that have a change whose reduced cost is below `limit`, the closest ones first; all their changes lie in *pool. */
static size_t find_core(const aq_plan_problem *problem, const size_t *choice, double lambda, double limit, core_item *core, change *pool, point *points) {
    size_t n_core = 0, used = 0;
    for (size_t i = 0; i < problem->n_items; i++) {
        const aq_plan_item *item = &problem->items[i];
        const aq_plan_choice *now = &item->choices[choice[i]];
        double now_cost = cost_of(item, choice[i]);
        core_item c = {.item = i, .changes = pool + used, .least = INFINITY};
        size_t n = undominated(item, points);
        for (size_t k = 0; k < n; k++) {
            if (points[k].choice == choice[i]) continue;
            change to = {.bytes = (int64_t)points[k].bytes - (int64_t)now->bytes, .cost = points[k].cost - now_cost, .choice = points[k].choice};
            to.reduced = to.cost + lambda * (double)to.bytes;
            if (to.reduced < 0) to.reduced = 0; /* rounding: the corner is optimal for lambda */
            if (to.reduced >= limit) continue;
            if (to.reduced < c.least) c.least = to.reduced;
            pool[used++] = to;
            c.n_changes++;
        }
        if (c.n_changes) core[n_core++] = c;
    }
    qsort(core, n_core, sizeof *core, by_least);
    return n_core < MOST_CORE ? n_core : MOST_CORE;
}

/* Merges list a with list b shifted by a change, both by rising size; drops what is dominated later. */
static size_t merge(const state *a, size_t n_a, const stage *before, const change *by, uint32_t number, double limit, state *out) {
    size_t i = 0, n = 0;
    for (uint32_t k = 0; k < before->n; k++) {
        const state *s = &before->states[k];
        state moved = {s->bytes + by->bytes, s->cost + by->cost, s->reduced + by->reduced, k, number};
        if (moved.reduced >= limit) continue;
        while (i < n_a && (a[i].bytes < moved.bytes || (a[i].bytes == moved.bytes && a[i].cost <= moved.cost))) out[n++] = a[i++];
        out[n++] = moved;
    }
    while (i < n_a) out[n++] = a[i++];
    return n;
}

static size_t drop_dominated(state *s, size_t n) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++)
        if (m == 0 || s[i].cost < s[m - 1].cost) s[m++] = s[i];
    return m;
}

/* Of equal ranges of size, the state of least reduced cost; staying as it is always survives. */
static size_t thin(state *s, size_t n) {
    if (n <= MOST_STATES) return n;
    double low = (double)s[0].bytes, width = ((double)s[n - 1].bytes - low) / (MOST_STATES - 2);
    size_t m = 0;
    double last = -1;
    for (size_t i = 0; i < n; i++) {
        bool origin = s[i].bytes == 0 && s[i].reduced <= 0;
        double bucket = floor(((double)s[i].bytes - low) / width);
        if (m > 0 && bucket == last && !origin) {
            bool kept_origin = s[m - 1].bytes == 0 && s[m - 1].reduced <= 0;
            if (!kept_origin && s[i].reduced < s[m - 1].reduced) s[m - 1] = s[i];
            continue;
        }
        if (m == MOST_STATES) break;
        s[m++] = s[i];
        last = bucket;
    }
    return m;
}

/* Room for everything; one allocation each, sized by the problem. */
typedef struct {
    point *points;
    step *steps;
    core_item *core;
    change *pool;
    stage stages[MOST_CORE + 1];
    state *merged[2];
} workspace;

static void free_workspace(workspace *w) {
    aq_free(w->points);
    aq_free(w->steps);
    aq_free(w->core);
    aq_free(w->pool);
    for (size_t i = 0; i <= MOST_CORE; i++) aq_free(w->stages[i].states);
    aq_free(w->merged[0]);
    aq_free(w->merged[1]);
    aq_free(w);
}

static workspace *make_workspace(const aq_plan_problem *problem) {
    size_t total = 0, most = 1;
    for (size_t i = 0; i < problem->n_items; i++) {
        total += problem->items[i].n_choices;
        if (problem->items[i].n_choices > most) most = problem->items[i].n_choices;
    }
    workspace *w = aq_calloc(1, sizeof *w);
    if (!w) return NULL;
    w->points = aq_calloc(most, sizeof *w->points);
    w->steps = aq_calloc(total + 1, sizeof *w->steps);
    w->core = aq_calloc(problem->n_items + 1, sizeof *w->core);
    w->pool = aq_calloc(total + 1, sizeof *w->pool);
    w->merged[0] = aq_calloc(MOST_STATES * (most + 1), sizeof(state));
    w->merged[1] = aq_calloc(MOST_STATES * (most + 1), sizeof(state));
    if (w->points && w->steps && w->core && w->pool && w->merged[0] && w->merged[1]) return w;
    free_workspace(w);
    return NULL;
}

/* Improves the corner in choice[] with up to `spare` bytes more; `next` is the step that did not fit. */
static bool fill_gap(workspace *w, const aq_plan_problem *problem, const step *next, uint64_t spare, size_t *choice) {
    size_t n_core = find_core(problem, choice, next->rate, next->saved, w->core, w->pool, w->points);
    stage *stages = w->stages;
    if (!(stages[0].states = aq_calloc(1, sizeof(state)))) return false;
    stages[0].n = 1;
    for (size_t i = 0; i < n_core; i++) {
        const core_item *item = &w->core[i];
        state *now = w->merged[0], *other = w->merged[1];
        size_t n = merge(NULL, 0, &stages[i], &(change){0}, 0, next->saved, now); /* staying */
        for (uint32_t k = 0; k < item->n_changes; k++) {
            n = merge(now, n, &stages[i], &item->changes[k], k + 1, next->saved, other);
            state *swap = now;
            now = other;
            other = swap;
        }
        n = drop_dominated(now, n);
        n = drop_dominated(now, thin(now, n));
        if (!(stages[i + 1].states = aq_alloc(n * sizeof(state)))) return false;
        memcpy(stages[i + 1].states, now, n * sizeof(state));
        stages[i + 1].n = n;
    }
    /* The last that fits is the cheapest that fits. */
    const stage *last = &stages[n_core];
    size_t best = last->n;
    for (size_t k = 0; k < last->n && (last->states[k].bytes <= 0 || (uint64_t)last->states[k].bytes <= spare); k++) best = k;
    if (best == last->n || last->states[best].cost >= 0) return true; /* the corner itself */
    for (size_t i = n_core; i > 0; i--) {
        const state *s = &stages[i].states[best];
        const core_item *item = &w->core[i - 1];
        if (s->change) choice[item->item] = item->changes[s->change - 1].choice;
        best = s->parent;
    }
    return true;
}

static aq_status infeasible(const aq_plan_problem *problem, uint64_t budget, uint64_t minimum, aq_error *err) {
    aq_fail(err, AQ_ERR_BUDGET, "the budget of %" PRIu64 " bytes cannot be met: the smallest size that %zu layers can reach is %" PRIu64 " bytes", budget,
            problem->n_items, minimum);
    aq_hint(err, "give --target-size=%" PRIu64 "B or more, allow fewer bits (--allow-bits), or a lower floor (--min-accuracy)", minimum);
    if (err) err->minimum_bytes = minimum;
    return AQ_ERR_BUDGET;
}

aq_status aq_plan_choose(const aq_plan_problem *problem, uint64_t budget_bytes, size_t *choice, uint64_t *minimum_bytes, aq_error *err) {
    uint64_t minimum, maximum;
    aq_status status = aq_plan_problem_check(problem, err);
    if (status != AQ_OK) return status;
    aq_plan_extremes(problem, &minimum, &maximum);
    if (minimum_bytes) *minimum_bytes = minimum;
    if (budget_bytes == 0) budget_bytes = UINT64_MAX;
    if (minimum > budget_bytes) return infeasible(problem, budget_bytes, minimum, err);
    workspace *w = make_workspace(problem);
    if (!w) return aq_fail_memory(err, 0, "the tables of the planner");
    size_t n_steps = list_steps(problem, w->points, w->steps, choice), at = 0;
    uint64_t bytes = minimum;
    while (at < n_steps && w->steps[at].bytes <= budget_bytes - bytes) {
        bytes += w->steps[at].bytes;
        choice[w->steps[at].item] = w->steps[at].choice;
        at++;
    }
    if (at < n_steps && !fill_gap(w, problem, &w->steps[at], budget_bytes - bytes, choice)) status = aq_fail_memory(err, 0, "the tables of the planner");
    free_workspace(w);
    return status;
}

static const char *params_word(const aq_plan_choice *c) { return c->bits < 16 ? aq_params_form_name(c->spec.params) : NULL; }

aq_status aq_plan_of_choice(aq_plan **out, const aq_plan_problem *problem, const size_t *choice, aq_error *err) {
    aq_plan *plan = *out = aq_plan_create();
    aq_status status = plan ? AQ_OK : aq_fail_memory(err, 0, "a plan");
    for (size_t i = 0; i < problem->n_items && status == AQ_OK; i++) {
        const aq_plan_item *item = &problem->items[i];
        const aq_plan_choice *c = &item->choices[choice[i]];
        aq_plan_layer layer = {.name = item->name,
                               .bits = c->bits,
                               .group_size = c->bits < 16 ? (int64_t)c->spec.group_size : -1,
                               .params = params_word(c),
                               .method = c->bits < 16 ? aq_method_name(c->spec.method) : NULL,
                               .sensitivity = item->sensitivity,
                               .error = c->error,
                               .size_bytes = c->bytes};
        status = aq_plan_add(plan, &layer, err);
    }
    if (status == AQ_OK) return AQ_OK;
    aq_plan_free(plan);
    *out = NULL;
    return status;
}
