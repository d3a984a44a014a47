/* The words of the command line. One table of commands and one of options: parsing, help, docs/cli.md, shell completion and suggestions all read them,
 * so none can differ from another. The options of `quantize` are followed by one option for each field of the configuration (aq_config_field_at).
 */
#ifndef CLI_OPTIONS_H
#define CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

struct cli_args;

typedef struct cli_command {
    const char *name;
    const char *operands; /* as help shows them: "PATH", "A B"; "" when there are none */
    size_t min_operands, max_operands;
    const char *operand_words;               /* the allowed words "bash|zsh", or NULL: a file */
    const char *summary;                     /* one line */
    const char *details;                     /* a paragraph or two for `help COMMAND` */
    const char *examples;                    /* lines */
    int (*run)(const struct cli_args *args); /* returns the exit code */
} cli_command;

size_t cli_n_commands(void);
const cli_command *cli_command_at(size_t index);
const cli_command *cli_command_find(const char *name);

/* Headings of the help, in its order. */
typedef enum cli_group {
    GROUP_SCHEME,
    GROUP_METHOD,
    GROUP_LAYERS,
    GROUP_INPUT,
    GROUP_QUALITY,
    GROUP_OUTPUT,
    GROUP_RUN,
    GROUP_CONFIG,
    GROUP_FIELDS,
    GROUP_EVERYWHERE,
    GROUP_COUNT
} cli_group;
const char *cli_group_title(cli_group group);

typedef struct cli_option {
    const char *name;    /* without dashes */
    char letter;         /* short form, 0: none */
    const char *value;   /* what help calls the value: "FILE"; NULL: a switch */
    const char *words;   /* allowed values "auto|always|never"; NULL: checked where it is used */
    const char *field;   /* configuration field that it sets, or NULL */
    const char *set;     /* a switch that sets a field: the text it sets it to */
    bool repeat;         /* all values count, else the last */
    bool optional_value; /* `--name` and `--name=VALUE` */
    cli_group group;
    const char *commands; /* names separated by blanks, or "*" */
    const char *help;     /* one sentence, default in brackets */
} cli_option;

/* All options: the table, then those of the configuration fields. */
size_t cli_n_options(void);
size_t cli_n_table_options(void); /* those of the table, which come first */
const cli_option *cli_option_at(size_t index);
bool cli_option_applies(const cli_option *option, const cli_command *command);
/* The option of this name (n letters) that `command` takes; when none does, one that another command takes; NULL. command NULL: only those that all take. */
const cli_option *cli_option_find(const char *name, size_t n, const cli_command *command);
const cli_option *cli_option_find_letter(char letter, const cli_command *command);

/* The i-th of the words "a|b|c" as pointer and length; false past the end. */
bool cli_word_at(const char *words, size_t index, const char **word, size_t *n);

/* Number of edits (insert, delete, replace, swap of neighbours) between two words, at most 32 letters each looked at. */
unsigned cli_edit_distance(const char *a, size_t a_len, const char *b, size_t b_len);
/* The command or option (of `command`) nearest to a misspelt word, NULL when none is near. */
const char *cli_nearest_command(const char *word);
const char *cli_nearest_option(const char *word, size_t n, const cli_command *command);

#endif
