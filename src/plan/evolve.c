/* Evolutionary search over candidates (see plan.h): elitist, seeded, resumable.
 *
 * Layers are independent genes. A mutation moves a layer to the next smaller or larger of its undominated candidates; a child over the budget is repaired by
 * steps that cost least error per byte saved, and spends what is left by steps that save most error per byte. Every choice is evaluated once: fitness is
 * remembered by choice. The state after a generation (population, best, generator) is a JSON file, so that a search of hours goes on where it was stopped.
 */
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "plan/plan_internal.h"

#define STATE_SCHEMA "arrowquant.evolution/1"
enum { MOST_POPULATION = 100000, TOURNAMENT = 3 };

typedef struct {
    size_t *genes; /* [n_items] */
    double fitness;
} individual;

typedef struct {
    const aq_plan_problem *problem;
    const aq_evolution *o;
    uint64_t budget;
    size_t n;         /* genes */
    size_t **ladder;  /* per item: its undominated candidates by rising size */
    size_t *n_ladder; /* [n] */
    individual *now, *next;
    uint64_t random;
    uint32_t generation;
    uint64_t n_evaluations;
    json_t *known; /* choice -> fitness */
    char print[33];
    aq_error *err;
} search;

void aq_evolution_init(aq_evolution *evolution) {
    *evolution = (aq_evolution){.population = 20, .generations = 10, .mutation_rate = 0.2, .crossover_rate = 0.7, .elite_ratio = 0.1, .max_evaluations = 200};
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t draw(search *s) {
    uint64_t z = (s->random += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static double uniform(search *s) { return (double)(draw(s) >> 11) * 0x1p-53; }
static size_t below(search *s, size_t n) { return (size_t)(uniform(s) * (double)n); }

/* ---- genes ---- */

static uint64_t bytes_of(const search *s, size_t item, size_t choice) { return s->problem->items[item].choices[choice].bytes; }
static double cost_of(const search *s, size_t item, size_t choice) { return s->problem->items[item].weight * s->problem->items[item].choices[choice].error; }

/* Position of a choice on its ladder: of one that is not on it, the largest step that is not larger. */
static size_t position(const search *s, size_t item, size_t choice) {
    size_t at = 0;
    for (size_t k = 0; k < s->n_ladder[item]; k++)
        if (s->ladder[item][k] == choice || bytes_of(s, item, s->ladder[item][k]) <= bytes_of(s, item, choice)) at = k;
    return at;
}

/* The step of all layers with the best rate: down, the least error gained per byte saved; up, the most error saved per byte, within `room`. */
static bool best_step(const search *s, const size_t *genes, bool up, uint64_t room, size_t *item, size_t *choice) {
    double best = 0;
    bool found = false;
    for (size_t i = 0; i < s->n; i++) {
        size_t at = position(s, i, genes[i]);
        if (up ? at + 1 >= s->n_ladder[i] : at == 0) continue;
        size_t to = s->ladder[i][up ? at + 1 : at - 1];
        uint64_t now = bytes_of(s, i, genes[i]), then = bytes_of(s, i, to);
        uint64_t change = up ? then - now : now - then;
        if (up ? then <= now || change > room : then >= now) continue;
        double rate = (up ? cost_of(s, i, genes[i]) - cost_of(s, i, to) : cost_of(s, i, genes[i]) - cost_of(s, i, to)) / (double)change;
        if (!found || rate > best) best = rate, *item = i, *choice = to, found = true;
    }
    return found;
}

static void repair(const search *s, size_t *genes) {
    uint64_t bytes = aq_plan_bytes(s->problem, genes);
    size_t item = 0, choice = 0;
    while (bytes > s->budget && best_step(s, genes, false, 0, &item, &choice)) {
        bytes -= bytes_of(s, item, genes[item]) - bytes_of(s, item, choice);
        genes[item] = choice;
    }
    while (bytes <= s->budget && best_step(s, genes, true, s->budget - bytes, &item, &choice)) {
        bytes += bytes_of(s, item, choice) - bytes_of(s, item, genes[item]);
        genes[item] = choice;
    }
}

static void mutate(search *s, size_t *genes, double rate) {
    for (size_t i = 0; i < s->n; i++) {
        if (s->n_ladder[i] < 2 || uniform(s) >= rate) continue;
        size_t at = position(s, i, genes[i]);
        bool up = at == 0 || (at + 1 < s->n_ladder[i] && uniform(s) < 0.5);
        genes[i] = s->ladder[i][up ? at + 1 : at - 1];
    }
}

static const individual *select_parent(search *s) {
    const individual *best = &s->now[below(s, s->o->population)];
    for (int k = 1; k < TOURNAMENT; k++) {
        const individual *other = &s->now[below(s, s->o->population)];
        if (other->fitness < best->fitness) best = other;
    }
    return best;
}

/* ---- fitness ---- */

static void key_of(const search *s, const size_t *genes, char out[33]) { aq_xxh3_hex(genes, s->n * sizeof *genes, out); }

/* False when the caller stops or memory is out; *err is set then. */
static bool evaluate(search *s, individual *one) {
    char key[33];
    key_of(s, one->genes, key);
    const json_t *known = json_object_get(s->known, key);
    if (known) {
        one->fitness = json_is_number(known) ? json_number_value(known) : HUGE_VAL;
        return true;
    }
    s->n_evaluations++;
    if (s->o->fitness) {
        if (!s->o->fitness(s->o->user, s->problem, one->genes, &one->fitness)) {
            aq_fail(s->err, AQ_ERR_INTERRUPTED, "interrupted: the evolutionary search was stopped%s",
                    s->o->state_path ? "; the same search goes on from its last generation" : "");
            return false;
        }
    } else {
        one->fitness = aq_plan_error(s->problem, one->genes);
    }
    if (isnan(one->fitness)) one->fitness = HUGE_VAL;
    if (json_object_set_new(s->known, key, isfinite(one->fitness) ? json_real(one->fitness) : json_null()) == 0) return true;
    aq_fail_memory(s->err, 0, "the evolutionary search");
    return false;
}

static bool exhausted(const search *s) { return s->o->max_evaluations && s->n_evaluations >= s->o->max_evaluations; }

static int by_fitness(const void *a, const void *b) {
    const individual *p = a, *q = b;
    return p->fitness < q->fitness ? -1 : p->fitness > q->fitness;
}

/* Stable, so that equal ones keep their order on every platform. */
static void sort(const search *s, individual *all) {
    for (size_t i = 1; i < s->o->population; i++)
        for (size_t k = i; k > 0 && by_fitness(&all[k], &all[k - 1]) < 0; k--) {
            individual swap = all[k];
            all[k] = all[k - 1];
            all[k - 1] = swap;
        }
}

/* ---- generations ---- */

static bool first_generation(search *s, const size_t *start) {
    for (size_t i = 0; i < s->o->population; i++) {
        individual *one = &s->now[i];
        memcpy(one->genes, start, s->n * sizeof *start);
        one->fitness = HUGE_VAL;
        if (i > 0) {
            /* A few layers at first, so that the start's neighbours are looked at before what is far away. */
            mutate(s, one->genes, s->o->mutation_rate * (double)i / s->o->population);
            repair(s, one->genes);
        }
        if (i > 0 && exhausted(s)) continue;
        if (!evaluate(s, one)) return false;
    }
    sort(s, s->now);
    return true;
}

static void make_child(search *s, individual *child) {
    const individual *a = select_parent(s), *b = select_parent(s);
    memcpy(child->genes, a->genes, s->n * sizeof *child->genes);
    if (uniform(s) < s->o->crossover_rate)
        for (size_t i = 0; i < s->n; i++)
            if (draw(s) >> 63) child->genes[i] = b->genes[i];
    mutate(s, child->genes, s->o->mutation_rate);
    repair(s, child->genes);
    child->fitness = HUGE_VAL;
}

static bool next_generation(search *s) {
    size_t n_elite = (size_t)(s->o->elite_ratio * s->o->population);
    if (n_elite == 0) n_elite = 1;
    for (size_t i = 0; i < s->o->population; i++) {
        individual *child = &s->next[i];
        if (i < n_elite || exhausted(s)) {
            memcpy(child->genes, s->now[i].genes, s->n * sizeof *child->genes);
            child->fitness = s->now[i].fitness;
            continue;
        }
        make_child(s, child);
        if (!evaluate(s, child)) return false;
    }
    individual *swap = s->now;
    s->now = s->next;
    s->next = swap;
    sort(s, s->now);
    return true;
}

static bool tell(search *s) {
    if (!s->o->generation) return true;
    double sum = 0, worst = s->now[0].fitness;
    size_t n = 0;
    for (size_t i = 0; i < s->o->population; i++)
        if (isfinite(s->now[i].fitness)) sum += s->now[i].fitness, worst = s->now[i].fitness, n++;
    if (s->o->generation(s->o->user, s->generation, s->now[0].fitness, n ? sum / (double)n : HUGE_VAL, worst, s->n_evaluations)) return true;
    aq_fail(s->err, AQ_ERR_INTERRUPTED, "interrupted: the evolutionary search was stopped after generation %u", s->generation);
    return false;
}

/* ---- state ---- */

/* Identifies a search: problem, budget, start, settings (but how long it runs). */
static aq_status fingerprint(search *s, const size_t *start, aq_error *err) {
    XXH3_state_t *state = XXH3_createState();
    if (!state) return aq_fail_memory(err, 0, "the fingerprint of a search");
    XXH3_128bits_reset(state);
    for (size_t i = 0; i < s->n; i++) {
        const aq_plan_item *item = &s->problem->items[i];
        XXH3_128bits_update(state, item->name, strlen(item->name) + 1);
        XXH3_128bits_update(state, &item->weight, sizeof item->weight);
        for (size_t c = 0; c < item->n_choices; c++) {
            XXH3_128bits_update(state, &item->choices[c].bytes, sizeof item->choices[c].bytes);
            XXH3_128bits_update(state, &item->choices[c].error, sizeof item->choices[c].error);
        }
    }
    const uint64_t integers[] = {s->budget, s->o->population, s->o->seed, s->o->fitness != NULL};
    const double reals[] = {s->o->mutation_rate, s->o->crossover_rate, s->o->elite_ratio};
    XXH3_128bits_update(state, integers, sizeof integers);
    XXH3_128bits_update(state, reals, sizeof reals);
    XXH3_128bits_update(state, start, s->n * sizeof *start);
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    aq_xxh3_hex(digest.digest, sizeof digest.digest, s->print);
    return AQ_OK;
}

static json_t *genes_json(const search *s, const individual *one) {
    json_t *genes = json_array();
    for (size_t i = 0; i < s->n; i++) {
        if (genes && json_array_append_new(genes, json_integer((json_int_t)one->genes[i])) == 0) continue;
        json_decref(genes);
        return NULL;
    }
    return genes;
}

static aq_status save_state(const search *s, aq_error *err) {
    if (!s->o->state_path) return AQ_OK;
    json_t *population = json_array();
    for (size_t i = 0; i < s->o->population; i++) {
        json_t *fitness = isfinite(s->now[i].fitness) ? json_real(s->now[i].fitness) : json_null();
        json_t *one = json_pack("{s:o, s:o}", "genes", genes_json(s, &s->now[i]), "fitness", fitness); /* NULL when any part of it is */
        if (population && json_array_append_new(population, one) == 0) continue;
        json_decref(population);
        return aq_fail_memory(err, 0, "the state of the evolutionary search");
    }
    char random[32];
    snprintf(random, sizeof random, "%016" PRIx64, s->random);
    json_t *json = json_pack("{s:s, s:s, s:I, s:I, s:s, s:o, s:O}", "schema", STATE_SCHEMA, "search", s->print, "generation", (json_int_t)s->generation,
                             "evaluations", (json_int_t)s->n_evaluations, "random", random, "population", population, "known", s->known);
    char *text = json ? aq_json_dump(json, false) : NULL;
    json_decref(json);
    if (!text) return aq_fail_memory(err, 0, "the state of the evolutionary search");
    aq_status status = aq_file_write(s->o->state_path, text, strlen(text), err);
    free(text);
    return status;
}

static aq_status bad_state(const search *s, const char *what, aq_error *err) {
    aq_fail_at(err, AQ_ERR_FORMAT, s->o->state_path, NULL, "%s", what);
    aq_hint(err, "remove it to begin anew, or name another file");
    return AQ_ERR_FORMAT;
}

static bool read_genes(const search *s, const json_t *list, individual *one) {
    const json_t *value;
    size_t i;
    if (!json_is_array(list) || json_array_size(list) != s->n) return false;
    json_array_foreach(list, i, value) {
        if (!json_is_integer(value) || json_integer_value(value) < 0 || (uint64_t)json_integer_value(value) >= s->problem->items[i].n_choices) return false;
        one->genes[i] = (size_t)json_integer_value(value);
    }
    return true;
}

/* *found: the state was there and is that of this search. */
static aq_status load_state(search *s, bool *found, aq_error *err) {
    json_t *json;
    *found = false;
    if (!s->o->state_path || !aq_path_exists(s->o->state_path)) return AQ_OK;
    aq_status status = aq_json_load(&json, s->o->state_path, UINT64_C(1) << 30, 8, err);
    if (status != AQ_OK) return status;
    const char *schema = json_string_value(json_object_get(json, "schema")), *print = json_string_value(json_object_get(json, "search"));
    const char *random = json_string_value(json_object_get(json, "random"));
    const json_t *population = json_object_get(json, "population"), *entry, *known = json_object_get(json, "known"), *value;
    const char *key;
    size_t i;
    bool sound = schema && strcmp(schema, STATE_SCHEMA) == 0 && print && random && strspn(random, "0123456789abcdef") == 16 && strlen(random) == 16 &&
                 json_is_array(population) && json_is_integer(json_object_get(json, "generation")) && json_is_integer(json_object_get(json, "evaluations")) &&
                 json_is_object(known);
    if (!sound) status = bad_state(s, "is no state of an evolutionary search", err);
    if (sound && strcmp(print, s->print) != 0)
        status = bad_state(s, "is the state of another search: the model, the candidates, the budget or the settings differ", err);
    if (status == AQ_OK && json_array_size(population) != s->o->population) status = bad_state(s, "is damaged", err);
    if (status == AQ_OK) {
        json_array_foreach(population, i, entry) {
            const json_t *fitness = json_object_get(entry, "fitness");
            if (!read_genes(s, json_object_get(entry, "genes"), &s->now[i]) || aq_plan_bytes(s->problem, s->now[i].genes) > s->budget) {
                status = bad_state(s, "is damaged", err);
                break;
            }
            s->now[i].fitness = json_is_number(fitness) ? json_number_value(fitness) : HUGE_VAL;
        }
    }
    if (status == AQ_OK) {
        json_object_foreach((json_t *)(uintptr_t)known, key, value) {
            if (json_object_set(s->known, key, (json_t *)(uintptr_t)value) != 0) status = aq_fail_memory(err, 0, "the state of a search");
        }
        s->generation = (uint32_t)json_integer_value(json_object_get(json, "generation"));
        s->n_evaluations = (uint64_t)json_integer_value(json_object_get(json, "evaluations"));
        s->random = strtoull(random, NULL, 16);
        *found = status == AQ_OK;
    }
    json_decref(json);
    return status;
}

/* ---- the whole ---- */

static aq_status check(const search *s, const size_t *choice, aq_error *err) {
    const aq_evolution *o = s->o;
    if (o->population < 2 || o->population > MOST_POPULATION)
        return aq_fail(err, AQ_ERR_USAGE, "Invalid population size: %u. Must be between 2 and 100000", o->population);
    if (!(o->mutation_rate >= 0 && o->mutation_rate <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid mutation rate. Must be between 0.0 and 1.0");
    if (!(o->crossover_rate >= 0 && o->crossover_rate <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid crossover rate. Must be between 0.0 and 1.0");
    if (!(o->elite_ratio >= 0 && o->elite_ratio <= 1)) return aq_fail(err, AQ_ERR_USAGE, "Invalid elite ratio. Must be between 0.0 and 1.0");
    aq_status status = aq_plan_problem_check(s->problem, err);
    if (status != AQ_OK) return status;
    for (size_t i = 0; i < s->n; i++)
        if (choice[i] >= s->problem->items[i].n_choices)
            return aq_fail_at(err, AQ_ERR_USAGE, NULL, s->problem->items[i].name, "has no candidate %zu", choice[i]);
    if (aq_plan_bytes(s->problem, choice) > s->budget) return aq_fail(err, AQ_ERR_USAGE, "the start of the evolutionary search does not fit the budget");
    return AQ_OK;
}

static void free_search(search *s) {
    for (size_t i = 0; s->ladder && i < s->n; i++) aq_free(s->ladder[i]);
    for (size_t i = 0; i < s->o->population && s->o->population <= MOST_POPULATION; i++) {
        if (s->now) aq_free(s->now[i].genes);
        if (s->next) aq_free(s->next[i].genes);
    }
    aq_free(s->ladder);
    aq_free(s->n_ladder);
    aq_free(s->now);
    aq_free(s->next);
    json_decref(s->known);
}

static bool make_ladders(search *s) {
    s->ladder = aq_calloc(s->n + 1, sizeof *s->ladder);
    s->n_ladder = aq_calloc(s->n + 1, sizeof *s->n_ladder);
    for (size_t i = 0; s->ladder && s->n_ladder && i < s->n; i++) {
        if (!(s->ladder[i] = aq_calloc(s->problem->items[i].n_choices, sizeof **s->ladder))) return false;
        s->n_ladder[i] = aq_plan_undominated(&s->problem->items[i], s->ladder[i]);
        if (s->n_ladder[i] == 0) return false;
    }
    return s->ladder && s->n_ladder;
}

static bool make_populations(search *s) {
    s->now = aq_calloc(s->o->population, sizeof *s->now);
    s->next = aq_calloc(s->o->population, sizeof *s->next);
    for (size_t i = 0; s->now && s->next && i < s->o->population; i++) {
        s->now[i].genes = aq_calloc(s->n + 1, sizeof(size_t));
        s->next[i].genes = aq_calloc(s->n + 1, sizeof(size_t));
        if (!s->now[i].genes || !s->next[i].genes) return false;
    }
    return s->now && s->next;
}

static aq_status run(search *s, const size_t *start, aq_error *err) {
    bool found;
    aq_status status = fingerprint(s, start, err);
    if (status == AQ_OK) status = load_state(s, &found, err);
    if (status != AQ_OK) return status;
    if (!found) {
        if (!first_generation(s, start) || !tell(s)) return s->err->code;
        if ((status = save_state(s, err)) != AQ_OK) return status;
    }
    while (s->generation < s->o->generations && !exhausted(s)) {
        if (!next_generation(s)) return s->err->code;
        s->generation++;
        if ((status = save_state(s, err)) != AQ_OK) return status;
        if (!tell(s)) return s->err->code;
    }
    return AQ_OK;
}

aq_status aq_plan_evolve(const aq_plan_problem *problem, uint64_t budget_bytes, const aq_evolution *evolution, size_t *choice, double *fitness,
                         uint64_t *n_evaluations, aq_error *err) {
    aq_error own = {0};
    search s = {.problem = problem, .o = evolution, .budget = budget_bytes ? budget_bytes : UINT64_MAX, .n = problem->n_items, .random = evolution->seed};
    s.err = err ? err : &own;
    aq_status status = check(&s, choice, s.err);
    if (status != AQ_OK) return status;
    s.known = json_object();
    if (!s.known || !make_ladders(&s) || !make_populations(&s)) status = aq_fail_memory(s.err, 0, "the evolutionary search");
    if (status == AQ_OK) status = run(&s, choice, s.err);
    if (status == AQ_OK) {
        memcpy(choice, s.now[0].genes, s.n * sizeof *choice);
        if (fitness) *fitness = s.now[0].fitness;
        if (n_evaluations) *n_evaluations = s.n_evaluations;
    }
    free_search(&s);
    return status;
}
