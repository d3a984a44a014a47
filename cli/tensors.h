/* Lists of tensors and sentences in a report: cut to what one wants to see at first, whole with -v. */
#ifndef CLI_TENSORS_H
#define CLI_TENSORS_H

#include <jansson.h>

#include "args.h"
#include "term.h"

/* A table of the tensors that `wanted` accepts (NULL: all). Without -v at most `most` of them, those with the lowest cosine first where they have one.
 * `align` and `heading`: see cli_table_create; `add_row` adds the cells of one tensor. */
void cli_print_tensors(const cli_args *args, const json_t *tensors, bool (*wanted)(const json_t *tensor), const char *align, const char *const *heading,
                       size_t most, void (*add_row)(cli_table *table, const json_t *tensor));
/* "WHAT: text", one line each; at most 20 without -v. */
void cli_print_sentences(const cli_args *args, const json_t *list, const char *what);

#endif
