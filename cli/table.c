/* Aligned tables on stdout: widths are measured in characters, and when a line would be too wide, names are cut in the middle
 * and remarks at the end. */
#include "term.h"

#include <string.h>

#include "base/mem.h"

struct cli_table {
    const char *align;
    size_t n_columns, n_cells, capacity;
    char **cells;
    bool broken; /* out of memory: what there is gets printed */
};

cli_table *cli_table_create(const char *align) {
    cli_table *table = aq_calloc(1, sizeof *table);
    if (!table) return NULL;
    table->align = align;
    table->n_columns = strlen(align);
    return table;
}

void cli_table_row(cli_table *table, const char *const *cells) {
    if (!table || table->broken) return;
    if (table->n_cells + table->n_columns > table->capacity) {
        size_t capacity = table->capacity * 2 + table->n_columns * 16;
        char **grown = aq_realloc(table->cells, capacity, sizeof *grown);
        if (!grown) {
            table->broken = true;
            return;
        }
        table->cells = grown;
        table->capacity = capacity;
    }
    for (size_t i = 0; i < table->n_columns; i++) {
        table->cells[table->n_cells] = aq_strdup(cells[i] ? cells[i] : "");
        if (!table->cells[table->n_cells]) {
            table->broken = true;
            while (table->n_cells % table->n_columns) aq_free(table->cells[--table->n_cells]);
            return;
        }
        table->n_cells++;
    }
}

/* Characters of UTF-8 text. Wide ones count as one: names of tensors have none. */
static size_t n_chars(const char *text) {
    size_t n = 0;
    for (; *text; text++) n += ((unsigned char)*text & 0xC0) != 0x80;
    return n;
}

static const char *skip_chars(const char *text, size_t n) {
    for (; n > 0 && *text; n--) {
        text++;
        while (((unsigned char)*text & 0xC0) == 0x80) text++;
    }
    return text;
}

static void print_cell(const char *text, size_t width, char align, bool last) {
    size_t n = n_chars(text), pad = n < width ? width - n : 0;
    if (align == 'r')
        cli_print(stdout, "%*s%s", (int)pad, "", text);
    else if (n <= width)
        cli_print(stdout, "%s%*s", text, last ? 0 : (int)pad, "");
    else {
        size_t left = align == 't' ? width - 3 : (width - 3) / 4, right = width - 3 - left;
        const char *middle = skip_chars(text, left);
        cli_print(stdout, "%.*s...%s", (int)(middle - text), text, skip_chars(text, n - right));
    }
    if (!last) cli_print(stdout, "  ");
}

/* Takes what is too much from the first column of this alignment, down to `least`. */
static void shrink(const cli_table *table, size_t *widths, char align, size_t least, size_t *excess) {
    const char *column = strchr(table->align, align);
    if (!column || widths[column - table->align] <= least) return;
    size_t *width = &widths[column - table->align], cut = *width - least < *excess ? *width - least : *excess;
    *width -= cut;
    *excess -= cut;
}

void cli_table_print(cli_table *table) {
    if (!table) return;
    size_t widths[16] = {0}, total = 0, columns = table->n_columns;
    for (size_t i = 0; i < table->n_cells; i++) {
        size_t n = n_chars(table->cells[i]);
        if (n > widths[i % columns]) widths[i % columns] = n;
    }
    for (size_t i = 0; i < columns; i++) total += widths[i] + (i > 0 ? 2 : 0);
    size_t most = (size_t)cli_term_width(stdout);
    if (most > 100) most = 100;
    size_t excess = total > most ? total - most : 0;
    shrink(table, widths, 'f', 36, &excess);
    shrink(table, widths, 't', 12, &excess);
    shrink(table, widths, 'f', 16, &excess);
    for (size_t row = 0; row < table->n_cells; row += columns) {
        char **cells = table->cells + row;
        size_t n = columns;
        while (n > 1 && !*cells[n - 1]) n--; /* no blanks at the end of a line */
        if (row == 0) cli_print(stdout, "%s", cli_color_on(stdout, COLOR_BOLD));
        for (size_t i = 0; i < n; i++) print_cell(cells[i], widths[i], table->align[i], i == n - 1);
        cli_print(stdout, "%s\n", row == 0 ? cli_color_off(stdout) : "");
    }
    for (size_t i = 0; i < table->n_cells; i++) aq_free(table->cells[i]);
    aq_free(table->cells);
    aq_free(table);
}
