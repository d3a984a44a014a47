/* Parsing of the command line: `--opt value`, `--opt=value`, `-o value`, `-ovalue`, clusters of switches (-qv), `--` ends the options.
 * Options that all commands take may stand before the command.
 */
#include "args.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/mem.h"

typedef struct parser {
    cli_args *args;
    int argc, at; /* argv[at] is the next word */
    char **argv;
} parser;

/* "a, b or c" from "a|b|c". */
static void list_words(char *out, size_t size, const char *words) {
    const char *word, *next;
    size_t n, next_n, used = 0;
    out[0] = 0;
    for (size_t i = 0; cli_word_at(words, i, &word, &n); i++) {
        const char *before = i == 0 ? "" : cli_word_at(words, i + 1, &next, &next_n) ? ", " : " or ";
        int len = snprintf(out + used, size - used, "%s%.*s", before, (int)n, word);
        if (len < 0 || (size_t)len >= size - used) return;
        used += (size_t)len;
    }
}

static bool is_one_of(const char *words, const char *value) {
    const char *word;
    size_t n;
    for (size_t i = 0; cli_word_at(words, i, &word, &n); i++)
        if (strlen(value) == n && memcmp(word, value, n) == 0) return true;
    return false;
}

static const char *escaped(char *buffer, size_t size, const char *text, size_t n) { return aq_escape(buffer, size, text, n); }

/* Whether a word is an option of the command, spelled in full: then it is not meant as the value of the one before. */
static bool is_option(const parser *p, const char *word) {
    if (strncmp(word, "--", 2) != 0) return false;
    size_t n = strcspn(word + 2, "=");
    const cli_option *option = cli_option_find(word + 2, n, p->args->command);
    return n > 0 && option && cli_option_applies(option, p->args->command);
}

/* Records an option. `value` NULL: a switch, or none was attached and the next word is it. */
static aq_status take(parser *p, const cli_option *option, const char *value, aq_error *err) {
    cli_args *args = p->args;
    if (!option->value && value) {
        aq_fail(err, AQ_ERR_USAGE, "--%s takes no value", option->name);
        return AQ_ERR_USAGE;
    }
    if (option->value && !value && !option->optional_value) {
        if (p->at >= p->argc || is_option(p, p->argv[p->at])) {
            aq_fail(err, AQ_ERR_USAGE, "--%s needs a value: %s", option->name, option->value);
            aq_hint(err, "%s", option->help);
            return AQ_ERR_USAGE;
        }
        value = p->argv[p->at++];
    }
    if (option->words && value && !is_one_of(option->words, value)) {
        char words[256], shown[128];
        list_words(words, sizeof words, option->words);
        return aq_fail(err, AQ_ERR_USAGE, "--%s: invalid value \"%s\"; must be %s", option->name, escaped(shown, sizeof shown, value, strlen(value)), words);
    }
    args->settings[args->n_settings++] = (cli_setting){option, value};
    if (strcmp(option->name, "json") == 0) args->json = true;
    if (strcmp(option->name, "help") == 0) args->help = true;
    if (strcmp(option->name, "quiet") == 0) args->quiet = true;
    if (strcmp(option->name, "verbose") == 0) args->verbose++;
    return AQ_OK;
}

/* An unknown option, or one of another command. */
static aq_status refuse(const parser *p, const cli_option *other, const char *name, size_t n, aq_error *err) {
    const cli_command *command = p->args->command;
    char shown[128];
    escaped(shown, sizeof shown, name, n);
    if (other) {
        if (command)
            aq_fail(err, AQ_ERR_USAGE, "--%s is not an option of %s", shown, command->name);
        else
            aq_fail(err, AQ_ERR_USAGE, "--%s must follow its command", shown);
        aq_hint(err, "it belongs to: %s", other->commands);
        return AQ_ERR_USAGE;
    }
    const char *nearest = cli_nearest_option(name, n, command);
    aq_fail(err, AQ_ERR_USAGE, "unknown option --%s", shown);
    if (nearest)
        aq_hint(err, "did you mean --%s?", nearest);
    else
        aq_hint(err, "arrowquant help%s%s lists the options", command ? " " : "", command ? command->name : "");
    return AQ_ERR_USAGE;
}

static aq_status parse_long(parser *p, const char *word, aq_error *err) {
    size_t n = strcspn(word, "=");
    const cli_option *option = cli_option_find(word, n, p->args->command);
    if (!p->args->command && n == 7 && memcmp(word, "version", 7) == 0) {
        p->args->version = true;
        return AQ_OK;
    }
    if (!option || !cli_option_applies(option, p->args->command)) return refuse(p, option, word, n, err);
    return take(p, option, word[n] ? word + n + 1 : NULL, err);
}

static aq_status parse_short(parser *p, const char *letters, aq_error *err) {
    for (const char *at = letters; *at; at++) {
        const cli_option *option = cli_option_find_letter(*at, p->args->command);
        if (!option) {
            char shown[128];
            aq_fail(err, AQ_ERR_USAGE, "unknown option -%s", escaped(shown, sizeof shown, letters, strlen(letters)));
            const char *nearest = at == letters ? cli_nearest_option(letters, strlen(letters), p->args->command) : NULL;
            if (nearest)
                aq_hint(err, "did you mean --%s?", nearest);
            else
                aq_hint(err, "arrowquant help lists the options; `--` goes before a path that begins with a dash");
            return AQ_ERR_USAGE;
        }
        bool attached = option->value && at[1];
        aq_status status = take(p, option, attached ? at + 1 : NULL, err);
        if (status || attached) return status;
    }
    return AQ_OK;
}

static aq_status parse_operand(parser *p, const char *word, aq_error *err) {
    cli_args *args = p->args;
    if (args->command) {
        args->operands[args->n_operands++] = word;
        return AQ_OK;
    }
    args->command = cli_command_find(word);
    if (args->command) return AQ_OK;
    char shown[128];
    const char *nearest = cli_nearest_command(word);
    aq_fail(err, AQ_ERR_USAGE, "unknown command \"%s\"", escaped(shown, sizeof shown, word, strlen(word)));
    if (nearest)
        aq_hint(err, "did you mean %s?", nearest);
    else if (strpbrk(word, "./"))
        aq_hint(err, "a command comes first, as in: arrowquant quantize %s", shown);
    else
        aq_hint(err, "arrowquant help lists the commands");
    return AQ_ERR_USAGE;
}

static aq_status check_operands(const cli_args *args, aq_error *err) {
    const cli_command *command = args->command;
    if (!command || args->help) return AQ_OK;
    if (args->n_operands < command->min_operands && !cli_args_has(args, "print-config")) {
        aq_fail(err, AQ_ERR_USAGE, "%s needs %s", command->name, command->operands);
        aq_hint(err, "arrowquant %s %s; see arrowquant help %s", command->name, command->operands, command->name);
        return AQ_ERR_USAGE;
    }
    if (args->n_operands > command->max_operands) {
        char shown[128];
        const char *extra = args->operands[command->max_operands];
        aq_fail(err, AQ_ERR_USAGE, "%s: unexpected argument \"%s\"", command->name, escaped(shown, sizeof shown, extra, strlen(extra)));
        aq_hint(err, "arrowquant %s%s%s", command->name, *command->operands ? " " : "", command->operands);
        return AQ_ERR_USAGE;
    }
    const char *words = command->operand_words;
    if (words && strcmp(words, "*") != 0 && !is_one_of(words, args->operands[0])) {
        char list[256], shown[128];
        list_words(list, sizeof list, words);
        return aq_fail(err, AQ_ERR_USAGE, "%s: unknown %.*s \"%s\"; must be %s", command->name, (int)strcspn(command->operands, " "), command->operands,
                       escaped(shown, sizeof shown, args->operands[0], strlen(args->operands[0])), list);
    }
    return AQ_OK;
}

aq_status cli_args_parse(cli_args *args, int argc, char **argv, aq_error *err) {
    *args = (cli_args){0};
    /* Each letter of a word gives at most one setting. */
    uint64_t n_letters = 0;
    for (int i = 1; i < argc; i++) n_letters += strlen(argv[i]);
    args->settings = aq_calloc(n_letters + 1, sizeof *args->settings);
    args->operands = aq_calloc((uint64_t)argc + 1, sizeof *args->operands);
    if (!args->settings || !args->operands) return aq_fail_memory(err, n_letters * sizeof *args->settings, "the command line");
    parser p = {args, argc, 1, argv};
    /* Needed before anything can fail, so that the failure is told in the right form. */
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--json") == 0) args->json = true;
    bool options_end = false;
    while (p.at < argc) {
        const char *word = argv[p.at++];
        aq_status status;
        if (options_end || word[0] != '-' || !word[1])
            status = parse_operand(&p, word, err);
        else if (strcmp(word, "--") == 0) {
            options_end = true;
            continue;
        } else
            status = word[1] == '-' ? parse_long(&p, word + 2, err) : parse_short(&p, word + 1, err);
        if (status) return status;
    }
    return check_operands(args, err);
}

void cli_args_free(cli_args *args) {
    aq_free(args->settings);
    aq_free(args->operands);
    *args = (cli_args){0};
}

bool cli_args_has(const cli_args *args, const char *name) {
    for (size_t i = 0; i < args->n_settings; i++)
        if (strcmp(args->settings[i].option->name, name) == 0) return true;
    return false;
}

const char *cli_args_value(const cli_args *args, const char *name) {
    const char *value = NULL;
    for (size_t i = 0; i < args->n_settings; i++)
        if (strcmp(args->settings[i].option->name, name) == 0) value = args->settings[i].value;
    return value;
}

aq_status cli_parse_count(uint64_t *out, const char *text, const char *option, aq_error *err) {
    uint64_t value = 0;
    const char *at = text;
    for (; *at >= '0' && *at <= '9'; at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        if (value > (UINT64_MAX - digit) / 10) break;
        value = value * 10 + digit;
    }
    if (*at || at == text) {
        char shown[128];
        return aq_fail(err, AQ_ERR_USAGE, "%s: invalid number \"%s\"; must be a whole number such as 4", option,
                       escaped(shown, sizeof shown, text, strlen(text)));
    }
    *out = value;
    return AQ_OK;
}

/* Number with decimals, then a unit. Computed in integers: the size is exact, and no locale has a say. */
aq_status cli_parse_size(uint64_t *out, const char *text, const char *option, aq_error *err) {
    static const struct {
        const char *name;
        uint64_t bytes;
    } units[] = {
        {"B", 1},
        {"K", 1000},
        {"KB", 1000},
        {"M", 1000000},
        {"MB", 1000000},
        {"G", 1000000000},
        {"GB", 1000000000},
        {"T", 1000000000000},
        {"TB", 1000000000000},
        {"KIB", 1024},
        {"MIB", 1048576},
        {"GIB", 1073741824},
        {"TIB", UINT64_C(1099511627776)},
    };
    uint64_t digits = 0, divisor = 1;
    bool point = false, any = false, good = true;
    const char *at = text;
    for (; (*at >= '0' && *at <= '9') || (*at == '.' && !point); at++) {
        if (*at == '.') {
            point = true;
            continue;
        }
        any = true;
        if (digits > 1000000000000 || divisor >= 1000000)
            good = false; /* more digits than a size has use for */
        else {
            digits = digits * 10 + (uint64_t)(*at - '0');
            if (point) divisor *= 10;
        }
    }
    while (*at == ' ') at++;
    char unit[8] = "";
    for (size_t i = 0; i < sizeof unit - 1 && at[i]; i++) unit[i] = (char)(at[i] >= 'a' && at[i] <= 'z' ? at[i] - 32 : at[i]);
    for (size_t i = 0; i < sizeof units / sizeof units[0] && good && any; i++) {
        if (strcmp(unit, units[i].name) != 0 || strlen(at) != strlen(unit)) continue;
        if (digits > UINT64_MAX / units[i].bytes) break;
        *out = digits * units[i].bytes / divisor;
        return AQ_OK;
    }
    char shown[128];
    aq_fail(err, AQ_ERR_USAGE, "%s: invalid size \"%s\"; must be a number and a unit, such as 4GB or 500MiB", option,
            escaped(shown, sizeof shown, text, strlen(text)));
    aq_hint(err, "GB = 1,000,000,000 bytes, GiB = 1,073,741,824 bytes; B, KB, MB, TB, KiB, MiB, TiB too");
    return AQ_ERR_USAGE;
}
