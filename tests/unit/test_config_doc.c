/* docs/configuration.md holds the table of settings and the table of profiles that the library really has.
 * With AQ_UPDATE_DOCS=1 the test writes both tables into the file instead of comparing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <arrowquant/config.h>

#define DOC AQ_SOURCE_DIR "/docs/configuration.md"

static char *read_doc(void) {
    static char text[1 << 16];
    FILE *file = fopen(DOC, "rb");
    assert_non_null(file);
    size_t n = fread(text, 1, sizeof text - 1, file);
    assert_true(n > 0 && n < sizeof text - 1);
    fclose(file);
    text[n] = 0;
    return text;
}

/* A cell: bars would end it. */
static void put_cell(FILE *out, const char *text, const char *quote) {
    fprintf(out, "%s", quote);
    for (; *text; text++) fprintf(out, *text == '|' ? "\\|" : "%c", *text);
    fprintf(out, "%s | ", quote);
}

static void put_profiles(FILE *out) {
    static const char *const names[] = {"edge", "local", "cloud"};
    static const char *const columns[] = {"bit_width",           "num_time_groups",      "group_size",    "min_accuracy",
                                          "calibration_samples", "target_model_size_mb", "enable_spatial"};
    for (size_t i = 0; i < 3; i++) {
        aq_config *config = aq_config_create();
        assert_int_equal(aq_config_apply_profile(config, names[i], NULL), AQ_OK);
        fprintf(out, "| %s", names[i]);
        for (size_t k = 0; k < 7; k++) {
            char *value = aq_config_get_json(config, columns[k]);
            fprintf(out, " | %s", value);
            aq_config_free_text(value);
        }
        fprintf(out, " |\n");
        aq_config_destroy(config);
    }
}

static void put_settings(FILE *out) {
    aq_config *config = aq_config_create();
    for (size_t i = 0; i < aq_config_n_fields(); i++) {
        const aq_config_field *field = aq_config_field_at(i);
        char *preset = aq_config_get_json(config, field->name), valid[256];
        fprintf(out, "| ");
        put_cell(out, field->name, "`");
        put_cell(out, preset, "`");
        snprintf(valid, sizeof valid, "%s%s", field->values, field->nullable ? "; null" : "");
        put_cell(out, valid, "");
        fprintf(out, "%s |\n", field->help);
        aq_config_free_text(preset);
    }
    aq_config_destroy(config);
}

/* The document with its tables made anew: below a heading, the rows behind the line of dashes. free(). */
static char *render(const char *text) {
    static const char *const headings[] = {"## Profiles\n", "## Settings\n"};
    char *result = NULL;
    size_t size;
    FILE *out = open_memstream(&result, &size);
    assert_non_null(out);
    for (size_t i = 0; i < 2; i++) {
        const char *heading = strstr(text, headings[i]);
        assert_non_null(heading);
        const char *rows = strstr(strstr(heading, "|---"), "\n") + 1, *end = rows;
        while (*end == '|') end = strchr(end, '\n') + 1;
        fwrite(text, 1, (size_t)(rows - text), out);
        if (i == 0)
            put_profiles(out);
        else
            put_settings(out);
        text = end;
    }
    fputs(text, out);
    fclose(out);
    return result;
}

static void documented_tables_are_those_of_the_library(void **state) {
    (void)state;
    char *text = read_doc(), *expected = render(text);
    if (getenv("AQ_UPDATE_DOCS")) {
        FILE *file = fopen(DOC, "wb");
        assert_non_null(file);
        assert_true(fputs(expected, file) >= 0 && fclose(file) == 0);
    } else {
        assert_string_equal(text, expected);
    }
    free(expected);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(documented_tables_are_those_of_the_library)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
