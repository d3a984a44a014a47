/* Help texts, all from the table of options.c: the overview, `help COMMAND`, and the manual as Markdown (docs/cli.md). */
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "log.h"
#include "base/mem.h"
#include "term.h"

enum { HELP_WIDTH = 100, OPTION_COLUMN = 28 };

/* Prints text from column `column` on, broken at blanks before `width`. */
static void print_wrapped(FILE *out, const char *text, size_t column, size_t width) {
    size_t at = column;
    for (const char *word = text; *word;) {
        size_t n = strcspn(word, " ");
        if (at > column && at + 1 + n > width) {
            fprintf(out, "\n%*s", (int)column, "");
            at = column;
        } else if (at > column) {
            putc(' ', out);
            at++;
        }
        fwrite(word, 1, n, out);
        at += n;
        word += n;
        word += strspn(word, " ");
    }
    putc('\n', out);
}

/* `--no-x` after the `--enable-x` of the same field: told together with it. */
static bool is_counterpart(size_t index) {
    const cli_option *option = cli_option_at(index), *before = index > 0 ? cli_option_at(index - 1) : option;
    return index > 0 && option->group == GROUP_FIELDS && option->field == before->field;
}

/* "--bits 2|4|8", "--enable-x, --no-x": how the option is written. */
static void option_form(char *out, size_t size, size_t index, bool markdown) {
    const cli_option *option = cli_option_at(index);
    const char *value = option->words && strlen(option->words) < 40 ? option->words : option->value;
    char letter[8] = "";
    if (option->letter)
        snprintf(letter, sizeof letter, "-%c, ", option->letter);
    else if (!markdown)
        snprintf(letter, sizeof letter, "    ");
    if (index + 1 < cli_n_options() && is_counterpart(index + 1))
        snprintf(out, size, "%s--%s, --%s", letter, option->name, cli_option_at(index + 1)->name);
    else
        snprintf(out, size, "%s--%s%s%s", letter, option->name, option->value ? " " : "", option->value ? value : "");
}

static void print_options(FILE *out, const cli_command *command) {
    for (int group = 0; group < GROUP_COUNT; group++) {
        bool any = false;
        for (size_t i = 0; i < cli_n_options(); i++) {
            const cli_option *option = cli_option_at(i);
            if ((int)option->group != group || !cli_option_applies(option, command) || is_counterpart(i)) continue;
            if (!any) fprintf(out, "\n%s%s%s\n", cli_color_on(stdout, COLOR_BOLD), cli_group_title(option->group), cli_color_off(stdout));
            any = true;
            char form[160];
            option_form(form, sizeof form, i, false);
            int n = fprintf(out, "  %s", form);
            if (n + 2 > OPTION_COLUMN)
                fprintf(out, "\n%*s", OPTION_COLUMN, "");
            else
                fprintf(out, "%*s", OPTION_COLUMN - n, "");
            print_wrapped(out, option->help, OPTION_COLUMN, HELP_WIDTH);
        }
    }
}

static void print_lines(FILE *out, const char *lines, const char *before) {
    for (const char *at = lines; *at;) {
        size_t n = strcspn(at, "\n");
        fprintf(out, "%s%.*s\n", before, (int)n, at);
        at += n;
        if (*at) at++;
    }
}

/* The same for prose, one paragraph a line. */
static void print_paragraphs(FILE *out, const char *text) {
    char paragraph[512];
    for (const char *at = text; *at;) {
        size_t n = strcspn(at, "\n");
        snprintf(paragraph, sizeof paragraph, "%.*s", (int)n, at);
        print_wrapped(out, paragraph, 0, HELP_WIDTH);
        at += n;
        if (*at) at++;
    }
}

static void print_usage(FILE *out, const cli_command *command) {
    fprintf(out, "Usage: arrowquant %s%s%s [options]\n", command->name, *command->operands ? " " : "", command->operands);
}

static void write_command_help(FILE *out, const cli_command *command) {
    print_usage(out, command);
    fprintf(out, "\n%s%s.\n", (char[]){(char)(command->summary[0] - 'a' + 'A'), 0}, command->summary + 1);
    print_paragraphs(out, command->details);
    fprintf(out, "\n%sExamples%s\n", cli_color_on(stdout, COLOR_BOLD), cli_color_off(stdout));
    print_lines(out, command->examples, "  ");
    print_options(out, command);
}

static const char exit_codes[] = "0    done\n"
                                 "1    unexpected failure: a bug, please report it\n"
                                 "2    wrong option or configuration\n"
                                 "3    input refused: malformed, unsupported, already quantized\n"
                                 "4    quality or verification not met, or a warning with --strict\n"
                                 "5    the size budget cannot be met\n"
                                 "6    file system: missing, exists, permission, full\n"
                                 "7    memory\n"
                                 "130  interrupted by SIGINT (143: SIGTERM); the same command goes on\n";

static const char environment[] = "ARROW_QUANT_NAME    a setting by the name of its field, as in ARROW_QUANT_BIT_WIDTH=8\n"
                                  "ARROWQUANT_ISA      kernels to use: scalar, avx2, avx512 or neon; the bytes are the same\n"
                                  "NO_COLOR, CLICOLOR_FORCE, TERM=dumb    colors and the progress bar\n"
                                  "LC_ALL, LC_CTYPE, LANG                 UTF-8 or ASCII output; numbers are the same in any\n";

static void write_all_help(FILE *out) {
    fprintf(out, "arrowquant %s: quantizes trained diffusion models and measures the result\n\n", aq_version());
    fprintf(out, "Usage: arrowquant COMMAND [options]\n\n%sCommands%s\n", cli_color_on(stdout, COLOR_BOLD), cli_color_off(stdout));
    for (size_t i = 0; i < cli_n_commands(); i++) {
        const cli_command *command = cli_command_at(i);
        int n = fprintf(out, "  %s %s", command->name, command->operands);
        fprintf(out, "%*s%s\n", n < 22 ? 22 - n : 1, "", command->summary);
    }
    print_options(out, NULL);
    fprintf(out, "\n%sExit codes%s\n", cli_color_on(stdout, COLOR_BOLD), cli_color_off(stdout));
    print_lines(out, exit_codes, "  ");
    fprintf(out, "\n%sEnvironment%s\n", cli_color_on(stdout, COLOR_BOLD), cli_color_off(stdout));
    print_lines(out, environment, "  ");
    fprintf(out, "\narrowquant help COMMAND tells more about one.\n");
}

/* Text in a Markdown table cell. */
static void write_cell(FILE *out, const char *text) {
    for (; *text; text++) {
        if (*text == '|' || *text == '*' || *text == '<') putc('\\', out);
        putc(*text, out);
    }
}

static void write_markdown_options(FILE *out, const cli_command *command, bool everywhere) {
    bool any = false;
    for (int group = 0; group < GROUP_COUNT; group++) {
        for (size_t i = 0; i < cli_n_options(); i++) {
            const cli_option *option = cli_option_at(i);
            if ((int)option->group != group || everywhere != (group == GROUP_EVERYWHERE) || !cli_option_applies(option, command) || is_counterpart(i)) continue;
            char form[160];
            option_form(form, sizeof form, i, true);
            if (!any) fprintf(out, "\n| | Option | |\n|---|---|---|\n");
            any = true;
            fprintf(out, "| %s | `", cli_group_title(option->group));
            for (const char *at = form; *at; at++) fprintf(out, *at == '|' ? "\\|" : "%c", *at);
            fputs("` | ", out);
            write_cell(out, option->help);
            fputs(" |\n", out);
        }
    }
}

static void write_markdown(FILE *out) {
    fputs("# The command line\n\nMade by `arrowquant help --markdown` from the program's own table of options: change that, not this file.\n\n"
          "Results go to stdout; progress, warnings and errors to stderr. Sizes need a unit: `GB` is 10^9 bytes, `GiB` 2^30.\n"
          "`--` ends the options. The last of an option given twice counts, unless it may be repeated.\n",
          out);
    for (size_t i = 0; i < cli_n_commands(); i++) {
        const cli_command *command = cli_command_at(i);
        fprintf(out, "\n## `arrowquant %s%s%s`\n\n%s%s.\n", command->name, *command->operands ? " " : "", command->operands,
                (char[]){(char)(command->summary[0] - 'a' + 'A'), 0}, command->summary + 1);
        print_lines(out, command->details, "");
        fputs("\n```sh\n", out);
        print_lines(out, command->examples, "");
        fputs("```\n", out);
        write_markdown_options(out, command, false);
    }
    fputs("\n## Everywhere\n", out);
    write_markdown_options(out, NULL, true);
    fputs("\n## Exit codes\n\n```\n", out);
    fputs(exit_codes, out);
    fputs("```\n\n## Environment\n\n```\n", out);
    fputs(environment, out);
    fputs("```\n", out);
}

static void write_overview(FILE *out) {
    fprintf(out,
            "arrowquant %s: quantizes trained diffusion models and measures the result\n\n"
            "  arrowquant inspect PATH           what a model holds, and what would be quantized\n"
            "  arrowquant quantize PATH [-o OUT] make it smaller and verify it\n"
            "  arrowquant help [COMMAND]         all commands and options\n\n"
            "Examples:\n"
            "  arrowquant quantize model.safetensors\n"
            "  arrowquant quantize pipeline-folder --bits 8 -o pipeline-int8\n"
            "  arrowquant export model-int4 --to safetensors --dtype f16\n",
            aq_version());
}

/* Runs `write` into memory and prints it: as it is, or as the text of a JSON object. */
static int print_text(const cli_args *args, const char *schema, void (*write)(FILE *out, const cli_command *command), const cli_command *command) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out) write(out, command);
    if (!out || fclose(out) != 0) {
        free(text);
        aq_error err = {.code = AQ_ERR_MEMORY, .message = "out of memory"};
        return cli_report_error(&err, args->json, NULL);
    }
    if (args->json) {
        json_t *root = json_pack("{s:s,s:s}", "schema", schema, "text", text);
        cli_print_json(root);
        json_decref(root);
    } else {
        cli_put(text);
    }
    free(text);
    return AQ_OK;
}

static void write_help(FILE *out, const cli_command *command) {
    if (command)
        write_command_help(out, command);
    else
        write_all_help(out);
}
static void write_manual(FILE *out, const cli_command *command) {
    (void)command;
    write_markdown(out);
}
static void write_short(FILE *out, const cli_command *command) {
    (void)command;
    write_overview(out);
}

int cli_print_overview(const cli_args *args) { return print_text(args, "arrowquant.help/1", write_short, NULL); }

int cli_print_help(const cli_args *args, const cli_command *command) { return print_text(args, "arrowquant.help/1", write_help, command); }

int cli_run_help(const cli_args *args) {
    if (cli_args_has(args, "markdown")) return print_text(args, "arrowquant.help/1", write_manual, NULL);
    if (args->n_operands == 0) return cli_print_help(args, NULL);
    const cli_command *command = cli_command_find(args->operands[0]);
    if (command) return cli_print_help(args, command);
    aq_error err;
    aq_fail(&err, AQ_ERR_USAGE, "unknown command \"%s\"", cli_safe(args->operands[0]));
    const char *nearest = cli_nearest_command(args->operands[0]);
    if (nearest)
        aq_hint(&err, "did you mean %s?", nearest);
    else
        aq_hint(&err, "arrowquant help lists the commands");
    return cli_report_error(&err, args->json, NULL);
}
