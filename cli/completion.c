/* `arrowquant completion SHELL`: scripts made from the table of options.c. They hold all words themselves, so completing runs no program. */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "log.h"
#include "term.h"

static FILE *out; /* memory that the script is written to */

static void AQ_PRINTF(1, 2) put(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(out, format, args);
    va_end(args);
}

/* Prints the words "a|b|c" with `between` between them. */
static void put_words(const char *words, const char *between) {
    const char *word;
    size_t n;
    for (size_t i = 0; cli_word_at(words, i, &word, &n); i++) put("%s%.*s", i ? between : "", (int)n, word);
}

/* All words of the option names that a command takes: "--bits --group … -o". */
static void put_option_names(const cli_command *command) {
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (!cli_option_applies(option, command)) continue;
        put("--%s ", option->name);
        if (option->letter) put("-%c ", option->letter);
    }
}

static void put_command_names(void) {
    for (size_t i = 0; i < cli_n_commands(); i++) put("%s%s", i ? " " : "", cli_command_at(i)->name);
}

static void put_operand_words(const cli_command *command) {
    if (!command->operand_words) return;
    if (strcmp(command->operand_words, "*") == 0)
        put_command_names();
    else
        put_words(command->operand_words, " ");
}

/* Values of an option, printed as cases of a shell `case` on the option's name. */
static void bash_values(void) {
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (!option->words || option->optional_value) continue;
        put("        --%s) words='", option->name);
        put_words(option->words, " ");
        put("' ;;\n");
    }
    put("        ");
    const char *between = "";
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (option->words || !option->value || option->optional_value) continue;
        put("%s--%s", between, option->name);
        if (option->letter) put("|-%c", option->letter);
        between = "|";
    }
    put(") files=1 ;;\n");
}

/* In bash, `=` splits words: `--bits=4` arrives as three. The function looks at the line again as words without that. */
static void bash(void) {
    put("# bash completion of arrowquant; load it with: source <(arrowquant completion bash)\n"
        "_arrowquant() {\n"
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= word words= files=\n"
        "    if [[ $cur == '=' ]]; then cur=; elif [[ $prev == '=' ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
        "    for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
        "        case $word in ");
    for (size_t i = 0; i < cli_n_commands(); i++) put("%s%s", i ? "|" : "", cli_command_at(i)->name);
    put(") command=$word; break ;; esac\n"
        "    done\n"
        "    case $prev in\n");
    bash_values();
    put("    esac\n"
        "    if [[ -z $words && -z $files ]]; then\n"
        "        case $command in\n"
        "        '') words='");
    put_command_names();
    put("'; [[ $cur == -* ]] && words='--version ");
    put_option_names(NULL);
    put("' ;;\n");
    for (size_t i = 0; i < cli_n_commands(); i++) {
        const cli_command *command = cli_command_at(i);
        put("        %s) if [[ $cur == -* ]]; then words='", command->name);
        put_option_names(command);
        put("'; else words='");
        put_operand_words(command);
        put("'; fi ;;\n");
    }
    put("        esac\n"
        "    fi\n"
        "    if [[ -n $words ]]; then COMPREPLY=($(compgen -W \"$words\" -- \"$cur\")); else COMPREPLY=($(compgen -f -- \"$cur\")); fi\n"
        "}\n"
        "complete -o filenames -o bashdefault -F _arrowquant arrowquant\n");
}

/* Text between single quotes, with what else zsh's _arguments reads as its own syntax escaped. */
static void put_quoted(const char *text, const char *escape) {
    for (; *text; text++) {
        if (*text == '\'')
            put("'\\''");
        else if (strchr(escape, *text))
            put("\\%c", *text);
        else
            put("%c", *text);
    }
}

static void zsh_option(const cli_option *option) {
    const char *forms[2] = {NULL, option->name};
    char letter[2] = {option->letter, 0};
    if (option->letter) forms[0] = letter;
    for (int form = 0; form < 2; form++) {
        if (!forms[form]) continue;
        const char *dashes = form == 0 ? "-" : "--";
        put(" \\\n                '%s%s%s%s[", option->repeat ? "*" : "", dashes, forms[form],
            option->optional_value       ? "=-"
            : option->value && form == 1 ? "="
            : option->value              ? "+"
                                         : "");
        put_quoted(option->help, "[]:\\");
        put("]");
        if (option->value) {
            put("%s", option->optional_value ? "::" : ":");
            put_quoted(option->value, ":\\");
            if (option->words) {
                put(":(");
                put_words(option->words, " ");
                put(")");
            } else {
                put(":_files");
            }
        }
        put("'");
    }
}

static void zsh(void) {
    put("#compdef arrowquant\n"
        "_arrowquant() {\n"
        "    local -a commands\n"
        "    commands=(\n");
    for (size_t i = 0; i < cli_n_commands(); i++) {
        put("        '%s:", cli_command_at(i)->name);
        put_quoted(cli_command_at(i)->summary, ":\\");
        put("'\n");
    }
    put("    )\n"
        "    if (( CURRENT == 2 )); then _describe command commands; return; fi\n"
        "    local command=$words[2]\n"
        "    shift words; (( CURRENT-- ))\n"
        "    case $command in\n");
    for (size_t i = 0; i < cli_n_commands(); i++) {
        const cli_command *command = cli_command_at(i);
        put("        %s) _arguments -s", command->name);
        for (size_t j = 0; j < cli_n_options(); j++)
            if (cli_option_applies(cli_option_at(j), command)) zsh_option(cli_option_at(j));
        if (command->operand_words) {
            put(" \\\n                '1:word:(");
            put_operand_words(command);
            put(")'");
        }
        if (command->operand_words ? command->max_operands > 1 : command->max_operands > 0) {
            put(" \\\n                '*:path:_files'");
        }
        put(" ;;\n");
    }
    put("    esac\n"
        "}\n"
        "if [[ $funcstack[1] == _arrowquant ]]; then _arrowquant \"$@\"; else compdef _arrowquant arrowquant; fi\n");
}

static void fish(void) {
    put("# fish completion of arrowquant\n");
    for (size_t i = 0; i < cli_n_commands(); i++) {
        const cli_command *command = cli_command_at(i);
        put("complete -c arrowquant -f -n __fish_use_subcommand -a %s -d '", command->name);
        for (const char *at = command->summary; *at; at++) put(*at == '\'' ? "\\'" : "%c", *at);
        put("'\n");
        if (!command->operand_words) continue;
        put("complete -c arrowquant -f -n '__fish_seen_subcommand_from %s' -a '", command->name);
        put_operand_words(command);
        put("'\n");
    }
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        put("complete -c arrowquant -l %s", option->name);
        if (option->letter) put(" -s %c", option->letter);
        if (strcmp(option->commands, "*") != 0) put(" -n '__fish_seen_subcommand_from %s'", option->commands);
        if (option->words && !option->optional_value) {
            put(" -xa '");
            put_words(option->words, " ");
            put("'");
        } else if (option->value && !option->optional_value) {
            put(" -r");
        }
        put(" -d '");
        for (const char *at = option->help; *at; at++) put(*at == '\'' || *at == '\\' ? "\\%c" : "%c", *at);
        put("'\n");
    }
}

static void powershell(void) {
    put("# PowerShell completion of arrowquant; load it with: arrowquant completion powershell | Out-String | Invoke-Expression\n"
        "Register-ArgumentCompleter -Native -CommandName arrowquant -ScriptBlock {\n"
        "    param($word, $ast, $position)\n"
        "    $values = @{\n");
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (!option->words || option->optional_value) continue;
        put("        '--%s' = '", option->name);
        put_words(option->words, " ");
        put("'\n");
    }
    put("    }\n    $commands = [ordered]@{\n");
    for (size_t i = 0; i < cli_n_commands(); i++) {
        put("        '%s' = '", cli_command_at(i)->name);
        put_option_names(cli_command_at(i));
        put_operand_words(cli_command_at(i));
        put("'\n");
    }
    put("    }\n"
        "    $given = @($ast.CommandElements | ForEach-Object { $_.ToString() })\n"
        "    $before = if ($word) { $given[-2] } else { $given[-1] }\n"
        "    $command = $given | Select-Object -Skip 1 | Where-Object { $commands.Contains($_) } | Select-Object -First 1\n"
        "    $words = if ($values.ContainsKey($before)) { $values[$before] } elseif ($command) { $commands[$command] } else { $commands.Keys -join ' ' }\n"
        "    $words -split ' ' | Where-Object { $_ -and $_.StartsWith($word) } | ForEach-Object { [System.Management.Automation.CompletionResult]::new($_) }\n"
        "}\n");
}

int cli_run_completion(const cli_args *args) {
    static const struct {
        const char *name;
        void (*print)(void);
    } shells[] = {{"bash", bash}, {"zsh", zsh}, {"fish", fish}, {"powershell", powershell}};
    char *script = NULL;
    size_t size = 0;
    out = open_memstream(&script, &size);
    for (size_t i = 0; out && i < sizeof shells / sizeof shells[0]; i++)
        if (strcmp(args->operands[0], shells[i].name) == 0) shells[i].print();
    if (!out || fclose(out) != 0) {
        free(script);
        aq_error err = {.code = AQ_ERR_MEMORY, .message = "out of memory"};
        return cli_report_error(&err, args->json, NULL);
    }
    if (args->json) {
        json_t *root = json_pack("{s:s,s:s}", "schema", "arrowquant.completion/1", "script", script);
        cli_print_json(root);
        json_decref(root);
    } else {
        cli_put(script);
    }
    free(script);
    return AQ_OK;
}
