/* The terminal: streams, colors, character set, width, and how figures are written. State of the one program that we are. */
#ifndef CLI_TERM_H
#define CLI_TERM_H

#include <arrowquant/base.h>
#include <jansson.h>
#include <stdio.h>

#include "base/error.h"

typedef enum cli_color { COLOR_NONE, COLOR_RED, COLOR_GREEN, COLOR_YELLOW, COLOR_BOLD, COLOR_DIM } cli_color;

/* Opens closed standard streams to /dev/null, so that a file opened later never takes number 0, 1 or 2. Call first. */
void cli_streams_open(void);
/* color: "auto", "always", "never"; NULL: auto. */
void cli_term_init(const char *color);
bool cli_term_utf8(void);
/* Columns of a stream's terminal, 100 when it is none. */
int cli_term_width(FILE *stream);
/* Escape sequences, "" when the stream has no colors. */
const char *cli_color_on(FILE *stream, cli_color color);
const char *cli_color_off(FILE *stream);

/* Prints formatted text; where the locale is not UTF-8, other characters get an ASCII form. */
void cli_print(FILE *stream, const char *format, ...) AQ_PRINTF(2, 3);
/* Writes text to stdout as it is: for programs (JSON, scripts), in UTF-8 under any locale. */
void cli_put(const char *text);
/* One of sixteen buffers in turn: the functions below that return text use them, so sixteen of them may stand in one printf. */
char *cli_buffer(size_t *size);
/* A string from a file or a person, made safe for a terminal. */
const char *cli_safe(const char *text);

/* The same, quoted where a shell would not read it as one word. */
const char *cli_shell_word(const char *text);

/* "6.42 GB", "512 B"; both: "6.42 GB (5.98 GiB)". */
const char *cli_size(uint64_t bytes);
const char *cli_size_both(uint64_t bytes);
/* "11.9 B", "1.2 M", "512": a count in words. */
const char *cli_count(uint64_t count);
/* "0:41", "1:02:03", "?" for NaN. */
const char *cli_duration(double seconds);

/* One JSON object on stdout. */
void cli_print_json(const json_t *value);
/* Flushes stdout. `code`, or 6 with a message when what was written did not arrive. A reader that has gone away is no error. */
int cli_finish(int code);

/* A table: columns of text, aligned, cut to the width of stdout. Cells are copied. */
typedef struct cli_table cli_table;
/* align: one letter a column: l, r, f (left, cut in the middle when the line is too wide) or t (left, cut at the end). NULL: no memory. */
cli_table *cli_table_create(const char *align);
/* As many cells as columns; the first row is the heading. */
void cli_table_row(cli_table *table, const char *const *cells);
/* Prints and frees. */
void cli_table_print(cli_table *table);

#endif
