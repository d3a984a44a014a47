/* Folders, shards, roles, modality: rows IX01-IX10 of the design, and what must be accepted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <arrowquant/model.h>

#include "base/file.h"
#include "base/mem.h"
#include "st_file.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

static aq_model_options defaults(void) {
    aq_model_options options;
    aq_model_options_init(&options);
    return options;
}

/* Each test has an empty folder. */
static int setup(void **state) {
    (void)state;
    st_dir_make();
    return 0;
}

static int teardown(void **state) {
    (void)state;
    st_dir_remove();
    return 0;
}

static const st_tensor g_two[] = {{"a.weight", "F32", {2, {64, 64}}, NULL}, {"a.bias", "F32", {1, {64}}, NULL}};
static const st_tensor g_other[] = {{"b.weight", "BF16", {2, {64, 64}}, NULL}};

/* Two shards, `m-00001-of-00002.safetensors` with a.weight and a.bias, `m-00002-…` with b.weight, in folder `dir`. */
#define SHARD1 "m-00001-of-00002.safetensors"
#define SHARD2 "m-00002-of-00002.safetensors"
#define MAP "\"a.weight\":\"" SHARD1 "\",\"a.bias\":\"" SHARD1 "\",\"b.weight\":\"" SHARD2 "\""

static void write_shards(void) {
    st_write_tensors("s/" SHARD1, g_two, 2, NULL);
    st_write_tensors("s/" SHARD2, g_other, 1, NULL);
}

static const char *write_index(const char *text) { return st_write_text("s/m.safetensors.index.json", text); }

/* ---- IX ---- */

static void IX01_a_shard_is_one_plain_file_name(void **state) {
    (void)state;
    static const char *const names[] = {"../" SHARD1,
                                        "x/" SHARD1,
                                        "/tmp/" SHARD1,
                                        "x\\\\y.safetensors",
                                        "..",
                                        ".",
                                        "C:x.safetensors",
                                        "~/x.safetensors",
                                        "~x.safetensors",
                                        "",
                                        "CON",
                                        "nul.safetensors",
                                        "Com1.safetensors",
                                        "lpt9.safetensors",
                                        "aux .safetensors",
                                        "x.safetensors.",
                                        "x.safetensors ",
                                        "x\\ny.safetensors"};
    write_shards();
    for (size_t i = 0; i < COUNT(names); i++) {
        char text[512];
        snprintf(text, sizeof text, "{\"weight_map\":{\"a.weight\":\"%s\"}}", names[i]);
        st_refuse(write_index(text), NULL, AQ_ERR_FORMAT, "expected one plain file name without folder");
        assert_string_equal(st_error.tensor, "a.weight");
    }
    st_refuse(write_index("{\"weight_map\":{\"a.weight\":\"x\\u0000.safetensors\"}}"), NULL, AQ_ERR_FORMAT, "NUL");
    st_refuse(write_index("{\"weight_map\":{\"a.weight\":\"pytorch_model-00001.bin\"}}"), NULL, AQ_ERR_FORMAT, "pickle is never read");
    st_refuse(write_index("{\"weight_map\":{\"a.weight\":\"x.npz\"}}"), NULL, AQ_ERR_FORMAT, "expected a .safetensors file");
}

static void IX02_a_link_is_followed_unless_forbidden(void **state) {
    (void)state;
    aq_model_options strict = defaults();
    strict.no_follow_symlinks = true;
    st_write_tensors("blobs/x", g_two, 2, NULL);
    st_write_tensors("s/" SHARD2, g_other, 1, NULL);
    assert_int_equal(symlink("../blobs/x", st_path("s/" SHARD1)), 0);
    const char *index = write_index("{\"weight_map\":{" MAP "}}");
    aq_model_close(st_open(index, NULL));
    st_refuse(index, &strict, AQ_ERR_FORMAT, "symbolic link");
    st_refuse(st_path("s/" SHARD1), &strict, AQ_ERR_FORMAT, "symbolic link");
    unlink(st_path("s/" SHARD1));
    assert_int_equal(symlink(SHARD1, st_path("s/" SHARD1)), 0);
    st_refuse(index, NULL, AQ_ERR_FORMAT, "loop of symbolic links");
    unlink(st_path("s/" SHARD1));
    assert_int_equal(symlink("../blobs/gone", st_path("s/" SHARD1)), 0); /* leads nowhere */
    st_refuse(index, NULL, AQ_ERR_FORMAT, "1 shard is missing");
    assert_int_equal(symlink("loop", st_path("loop")), 0);
    st_refuse(st_path("loop"), NULL, AQ_ERR_FORMAT, "loop of symbolic links");
}

static void IX03_a_shard_that_is_no_regular_file_is_refused(void **state) {
    (void)state;
    write_shards();
    const char *index = write_index("{\"weight_map\":{" MAP "}}"), *shard = st_path("s/" SHARD1);
    unlink(shard);
    assert_int_equal(mkfifo(shard, 0600), 0); /* no writer: a blocking open would hang here */
    st_refuse(index, NULL, AQ_ERR_FORMAT, "is a FIFO");
    st_refuse(shard, NULL, AQ_ERR_FORMAT, "is a FIFO");
    unlink(shard);
    assert_int_equal(mkdir(shard, 0700), 0);
    st_refuse(index, NULL, AQ_ERR_FORMAT, "is a folder");
    rmdir(shard);
    assert_int_equal(symlink("/dev/null", shard), 0);
    st_refuse(index, NULL, AQ_ERR_FORMAT, "is a device");
    unlink(shard);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(shard) < sizeof address.sun_path) {
        memcpy(address.sun_path, shard, strlen(shard) + 1);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
        st_refuse(index, NULL, AQ_ERR_FORMAT, "socket");
        close(fd);
    }
}

static void IX04_index_and_shards_must_agree(void **state) {
    (void)state;
    write_shards();
    st_refuse(write_index("{\"weight_map\":{" MAP ",\"c\":\"m-3.safetensors\",\"d\":\"m-4.safetensors\"}}"), NULL, AQ_ERR_FORMAT,
              "2 shards are missing: \"m-3.safetensors\", \"m-4.safetensors\"");
    st_refuse(write_index("{\"weight_map\":{" MAP ",\"c\":\"" SHARD2 "\"}}"), NULL, AQ_ERR_FORMAT, "1 tensors are in the index but in no shard: \"c\"");
    st_refuse(write_index("{\"weight_map\":{\"a.weight\":\"" SHARD1 "\",\"b.weight\":\"" SHARD2 "\"}}"), NULL, AQ_ERR_FORMAT,
              "1 tensors are in a shard but not in the index: \"a.bias\"");
    st_refuse(write_index("{\"weight_map\":{\"a.weight\":\"" SHARD2 "\",\"a.bias\":\"" SHARD1 "\",\"b.weight\":\"" SHARD2 "\"}}"), NULL, AQ_ERR_FORMAT,
              "in another shard than the index says: \"a.weight\"");
    st_refuse(write_index("{\"weight_map\":{" MAP ",\"b.weight\":\"" SHARD2 "\"}}"), NULL, AQ_ERR_FORMAT, "more than once in \"weight_map\"");
    st_write_tensors("s/" SHARD2, g_two, 2, NULL);
    st_refuse(write_index("{\"weight_map\":{" MAP "}}"), NULL, AQ_ERR_FORMAT, "2 tensors are in two shards: \"a.weight\", \"a.bias\"");
    char text[4096] = "{\"weight_map\":{";
    for (int i = 0; i < 25; i++) sprintf(text + strlen(text), "%s\"t%02d\":\"gone-%02d.safetensors\"", i ? "," : "", i, i);
    strcat(text, "}}");
    st_refuse(write_index(text), NULL, AQ_ERR_FORMAT, "\"gone-19.safetensors\" and 5 more");
}

static void IX04_an_index_of_wrong_form_is_refused(void **state) {
    (void)state;
    const struct {
        const char *text, *refusal;
    } cases[] = {
        {"", "expected an object"},
        {"[]", "expected an object"},
        {"{}", "\"weight_map\" is missing"},
        {"{\"weight_map\":{}}", "no tensors"},
        {"{\"weight_map\":[]}", "object of \"weight_map\""},
        {"{\"weight_map\":{\"a\":1}}", "expected a file name"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\"},\"weight_map\":{\"a\":\"x.safetensors\"}}", "appears twice"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\"}} x", "after the end"},
        {"{\"metadata\":{\"total_size\":NaN},\"weight_map\":{\"a\":\"x.safetensors\"}}", "JSON value"},
        {"{\"weight_map\":{\"\xff\":\"x.safetensors\"}}", "invalid UTF-8"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) st_refuse(write_index(cases[i].text), NULL, AQ_ERR_FORMAT, cases[i].refusal);
    aq_model_options options = defaults();
    options.limits.index_bytes = 10;
    st_refuse(write_index("{\"weight_map\":{}}"), &options, AQ_ERR_FORMAT, "over the limit index_bytes of 10");
    write_shards();
    options = defaults();
    options.limits.name_bytes = 7;
    st_refuse(write_index("{\"other\":[{}],\"weight_map\":{" MAP "}}"), &options, AQ_ERR_FORMAT, "a name of 8 bytes, over the limit name_bytes of 7");
    options = defaults();
    options.limits.n_tensors = 2;
    st_refuse(write_index("{\"weight_map\":{" MAP "}}"), &options, AQ_ERR_FORMAT, "over the limit n_tensors of 2");
    options = defaults();
    options.limits.n_shards = 1;
    st_refuse(write_index("{\"weight_map\":{" MAP "}}"), &options, AQ_ERR_FORMAT, "2 shards, over the limit n_shards of 1");
}

static void IX05_a_wrong_total_size_is_a_warning(void **state) {
    (void)state;
    write_shards();
    aq_model *model = st_open(write_index("{\"metadata\":{\"total_size\":24832,\"x\":{}},\"weight_map\":{" MAP "}}"), NULL);
    assert_int_equal(aq_model_n_warnings(model), 0);
    aq_model_close(model);
    model = st_open(write_index("{\"metadata\":{\"total_size\":24833},\"weight_map\":{" MAP "}}"), NULL);
    assert_int_equal(aq_model_n_warnings(model), 1);
    assert_non_null(strstr(aq_model_warning(model, 0), "total_size is 24,833, but the tensors take 24,832 bytes"));
    aq_model_close(model);
}

static void IX06_names_that_differ_only_in_case_are_found(void **state) {
    (void)state;
    const struct {
        const char *a, *b;
        bool clash;
    } cases[] = {{"Block.weight", "block.WEIGHT", true},
                 {"\xc3\x84.w", "\xc3\xa4.w", true}, /* A umlaut */
                 {"\xd0\x90", "\xd0\xb0", true},     /* Cyrillic a */
                 {"\xce\xa3x", "\xcf\x83X", true},   /* sigma */
                 {"a", "b", false},
                 {"\xc3\x97", "\xc3\xb7", false}}; /* times and divided by are no pair */
    for (size_t i = 0; i < COUNT(cases); i++) {
        st_tensor t[] = {{cases[i].a, "F32", {1, {1}}, NULL}, {cases[i].b, "F32", {1, {1}}, NULL}};
        aq_model *model = st_open(st_write_tensors("case.safetensors", t, 2, NULL), NULL); /* reading is fine */
        assert_int_equal(aq_model_case_clash(model, &st_error), cases[i].clash ? AQ_ERR_FORMAT : AQ_OK);
        if (cases[i].clash) assert_non_null(strstr(st_error.message, cases[i].a));
        aq_model_close(model);
    }
}

static void IX07_of_several_sets_of_weights_none_is_guessed(void **state) {
    (void)state;
    aq_model_options options = defaults();
    st_write_text("m/config.json", "{}");
    st_write_tensors("m/model.safetensors", g_two, 2, NULL);
    st_write_tensors("m/model.fp16.safetensors", g_other, 1, NULL);
    st_refuse(st_path("m"), NULL, AQ_ERR_USAGE, "several sets of weights: model.fp16.safetensors (variant fp16), model.safetensors");
    assert_non_null(strstr(st_error.hint, "--variant"));
    options.variant = "fp16";
    aq_model *model = st_open(st_path("m"), &options);
    assert_string_equal(aq_model_tensor(model, 0)->name, "b.weight");
    assert_string_equal(aq_model_weights_name(model), "model.safetensors");
    aq_model_close(model);
    options.variant = "model.safetensors";
    model = st_open(st_path("m"), &options);
    assert_string_equal(aq_model_tensor(model, 0)->name, "a.weight");
    aq_model_close(model);
    options.variant = "bf16";
    st_refuse(st_path("m"), &options, AQ_ERR_USAGE, "no weights of variant \"bf16\"");

    st_write_tensors("both/model.safetensors", g_two, 2, NULL); /* single file and shards */
    st_write_text("both/config.json", "{}");
    st_write_tensors("both/model-00001-of-00001.safetensors", g_two, 2, NULL);
    st_write_text("both/model.safetensors.index.json",
                  "{\"weight_map\":{\"a.weight\":\"model-00001-of-00001.safetensors\",\"a.bias\":\"model-00001-of-00001.safetensors\"}}");
    st_refuse(st_path("both"), NULL, AQ_ERR_USAGE, "model.safetensors, model.safetensors.index.json");
    options.variant = "model.safetensors.index.json";
    aq_model_close(st_open(st_path("both"), &options));
    unlink(st_path("both/model.safetensors.index.json"));
    st_refuse(st_path("both"), NULL, AQ_ERR_USAGE, "several sets");

    st_write_text("two/config.json", "{}"); /* two stems, and a config that belongs to one of them */
    st_write_tensors("two/x.safetensors", g_two, 2, NULL);
    st_write_tensors("two/y.safetensors", g_other, 1, NULL);
    st_refuse(st_path("two"), NULL, AQ_ERR_USAGE, "several sets");
}

static void IX07_a_lone_variant_is_no_ambiguity(void **state) {
    (void)state;
    static const char *const indexes[] = {"d.fp16.safetensors.index.json", "d.safetensors.fp16.index.json", "d.safetensors.index.fp16.json"};
    static const char *const shards[] = {"d.fp16-00001-of-00001.safetensors", "d-00001-of-00001.fp16.safetensors"};
    for (size_t i = 0; i < COUNT(indexes); i++) {
        for (size_t k = 0; k < COUNT(shards); k++) {
            char path[128], text[256];
            snprintf(path, sizeof path, "v%zu%zu/%s", i, k, shards[k]);
            st_write_tensors(path, g_other, 1, NULL);
            snprintf(path, sizeof path, "v%zu%zu/%s", i, k, indexes[i]);
            snprintf(text, sizeof text, "{\"weight_map\":{\"b.weight\":\"%s\"}}", shards[k]);
            st_write_text(path, text);
            snprintf(path, sizeof path, "v%zu%zu", i, k);
            aq_model_options options = defaults();
            for (int pass = 0; pass < 2; pass++) {
                aq_model *model = st_open(st_path(path), &options);
                assert_string_equal(aq_model_weights_name(model), "d.safetensors");
                aq_model_close(model);
                options.variant = "fp16";
            }
        }
    }
}

static void IX08_pickle_is_never_read(void **state) {
    (void)state;
    static const char *const names[] = {"pytorch_model.bin", "model.ckpt", "model.pt", "model.pth", "model.PKL"};
    for (size_t i = 0; i < COUNT(names); i++) {
        char name[64], dir[16];
        snprintf(dir, sizeof dir, "p%zu", i);
        snprintf(name, sizeof name, "%s/%s", dir, names[i]);
        st_write_text(name, "\x80\x02");
        st_refuse(st_path(dir), NULL, AQ_ERR_FORMAT, "pickle is never read; convert first");
        st_refuse(st_path(name), NULL, AQ_ERR_FORMAT, "pickle is never read; convert first");
    }
    st_write_tensors("p0/model.safetensors", g_two, 2, NULL); /* beside it: not looked at */
    aq_model *model = st_open(st_path("p0"), NULL);
    assert_int_equal(aq_model_n_side_files(model), 0);
    aq_model_close(model);
}

static void IX09_quantized_weights_are_refused_by_kind(void **state) {
    (void)state;
    st_write_tensors("q/model.safetensors", g_two, 2, NULL);
    st_write_text("q/config.json", "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4}}");
    st_refuse(st_path("q"), NULL, AQ_ERR_FORMAT, "quantization_config: the weights are already quantized (gptq)");
    st_write_text("q/config.json", "{\"quantization_config\":null}");
    aq_model_close(st_open(st_path("q"), NULL));
    const struct {
        const char *name, *dtype, *kind;
    } cases[] = {{"a.comfy_quant", "U8", "comfy_quant"},
                 {"a.SCB", "F32", "bitsandbytes int8"},
                 {"a.qweight", "I32", "GPTQ or AWQ (qweight)"},
                 {"a.weight.quant_map", "F32", "bitsandbytes 4 bit"},
                 {"a.weight.quant_state.bitsandbytes__nf4", "U8", "bitsandbytes 4 bit"},
                 {"a.weight_packed", "I32", "compressed-tensors"},
                 {"a.weight_scale_inv", "F32", "fp8 in blocks"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        st_tensor t[] = {{"a.weight", "I8", {2, {64, 64}}, NULL}, {cases[i].name, cases[i].dtype, {1, {4}}, NULL}};
        st_refuse(st_write_tensors("q.safetensors", t, 2, NULL), NULL, AQ_ERR_FORMAT, cases[i].kind);
        assert_string_equal(st_error.tensor, cases[i].name);
        assert_non_null(strstr(st_error.message, "already quantized"));
    }
    st_tensor scaled[] = {{"a.weight", "I8", {2, {4, 4}}, NULL}, {"a.weight_scale", "F32", {0, {0}}, NULL}};
    st_refuse(st_write_tensors("q.safetensors", scaled, 2, NULL), NULL, AQ_ERR_FORMAT, "already quantized: I8 with a scale (weight_scale)");
}

/* 64x64 fp8 with one scale, and with one per row, against values worked out by hand. */
static void IX09_fp8_with_a_scale_is_multiplied_by_it(void **state) {
    (void)state;
    enum { ROWS = 64, COLS = 64, N = ROWS * COLS };
    static uint8_t codes[N];
    static float out[N];
    float rows[ROWS], one = 0.5f;
    for (int i = 0; i < N; i++) codes[i] = (uint8_t)(i % 2 ? 0x38 : 0xC0); /* e4m3: 1 and -2 */
    for (int r = 0; r < ROWS; r++) rows[r] = (float)(r + 1);
    st_tensor t[] = {{"a.weight", "F8_E4M3", {2, {ROWS, COLS}}, codes}, {"a.scale_weight", "F32", {0, {0}}, &one},
                     {"a.scale_input", "F32", {0, {0}}, &one},          {"b.weight", "F8_E5M2", {2, {ROWS, COLS}}, codes}, /* e5m2: 0x38 = 0.5, 0xC0 = -2 */
                     {"b.weight_scale", "F32", {2, {ROWS, 1}}, rows},   {"scaled_fp8", "F8_E4M3", {1, {2}}, codes}};
    aq_model *model = st_open(st_write_tensors("fp8.safetensors", t, 6, NULL), NULL);
    static const aq_role roles[] = {AQ_ROLE_LAYER, AQ_ROLE_SCALE, AQ_ROLE_SCALE, AQ_ROLE_LAYER, AQ_ROLE_SCALE, AQ_ROLE_SCALE};
    for (size_t i = 0; i < 6; i++) assert_int_equal(aq_model_tensor(model, i)->role, roles[i]);
    assert_int_equal(aq_model_tensor(model, 0)->scale_index, 1);
    assert_int_equal(aq_model_read_f32(model, 0, 0, N, out, &st_error), AQ_OK);
    for (int i = 0; i < N; i++) assert_true(out[i] == (i % 2 ? 0.5f : -1.0f));
    for (uint64_t begin = 0; begin < N; begin += 97) { /* from the middle of a row to the middle of another */
        uint64_t n = N - begin < 301 ? N - begin : 301;
        assert_int_equal(aq_model_read_f32(model, 3, begin, n, out, &st_error), AQ_OK);
        for (uint64_t i = 0; i < n; i++) assert_true(out[i] == ((begin + i) % 2 ? 0.5f : -2.0f) * rows[(begin + i) / COLS]);
    }
    assert_int_equal(aq_model_n_warnings(model), 0); /* nothing is wrong: the run tells it as information */
    aq_model_close(model);
}

static void IX09_a_scale_without_its_weight_is_refused_and_the_reverse(void **state) {
    (void)state;
    float scale[4] = {1, 1, 1, 1};
    st_tensor alone[] = {{"x.weight", "F32", {2, {4, 4}}, NULL}, {"a.scale_weight", "F32", {0, {0}}, scale}};
    st_refuse(st_write_tensors("x.safetensors", alone, 2, NULL), NULL, AQ_ERR_FORMAT, "tensor \"a.scale_weight\": a scale without its weight");
    st_tensor lost[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {"a.scale_weight", "F32", {0, {0}}, scale}, {"b.weight", "F8_E4M3", {2, {4, 4}}, NULL}};
    st_refuse(st_write_tensors("x.safetensors", lost, 3, NULL), NULL, AQ_ERR_FORMAT, "tensor \"b.weight\": an fp8 weight without its scale");
    st_tensor both[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {"a.scale_weight", "F32", {0, {0}}, scale}, {"a.weight_scale", "F32", {0, {0}}, scale}};
    st_refuse(st_write_tensors("x.safetensors", both, 3, NULL), NULL, AQ_ERR_FORMAT, "a second scale");
    st_tensor shape[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {"a.scale_weight", "F32", {1, {3}}, scale}};
    st_refuse(st_write_tensors("x.safetensors", shape, 2, NULL), NULL, AQ_ERR_FORMAT, "expected one number or one per row");
    st_tensor dtype[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {"a.scale_weight", "I32", {1, {4}}, scale}};
    st_refuse(st_write_tensors("x.safetensors", dtype, 2, NULL), NULL, AQ_ERR_FORMAT, "I32 [4] as scale");
    static const char *const traces[] = {"scaled_fp8", "a.scale_input", "model.b.input_scale"}; /* scales there were, and they are lost */
    for (size_t i = 0; i < COUNT(traces); i++) {
        st_tensor trace[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {traces[i], "F32", {1, {1}}, scale}};
        st_refuse(st_write_tensors("x.safetensors", trace, 2, NULL), NULL, AQ_ERR_FORMAT, "an fp8 weight without its scale, while the file tells of scales");
    }
    st_tensor plain[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}}; /* no scale anywhere: a plain cast */
    aq_model *model = st_open(st_write_tensors("x.safetensors", plain, 1, NULL), NULL);
    assert_int_equal(aq_model_n_warnings(model), 1);
    assert_non_null(strstr(aq_model_warning(model, 0), "no scales"));
    aq_model_close(model);
}

static void IX10_a_malformed_config_is_refused(void **state) {
    (void)state;
    static const char *const files[] = {"c/config.json", "c/metadata.json", "c/model_index.json"};
    static char bomb[4096];
    memset(bomb, '[', sizeof bomb - 1);
    const struct {
        const char *text, *refusal;
    } cases[] = {{"{\"x\":NaN}", "invalid JSON"},
                 {"{\"x\":Infinity}", "invalid JSON"},
                 {"{\"x\":-Infinity}", "invalid JSON"},
                 {"{\"x\":1,\"x\":2}", "duplicate"},
                 {"{\"x\":1e999}", "invalid JSON"},
                 {bomb, "nested deeper than 64"},
                 {"{\"x\":\"\xff\"}", "invalid JSON"},
                 {"[]", "expected a JSON object"},
                 {"", "invalid JSON"},
                 {"{\"x\":99999999999999999999}", "invalid JSON"}};
    for (size_t f = 0; f < COUNT(files); f++) {
        st_write_tensors("c/model.safetensors", g_two, 2, NULL);
        for (size_t i = 0; i < COUNT(cases); i++) {
            st_write_text(files[f], cases[i].text);
            st_refuse(st_path("c"), NULL, AQ_ERR_FORMAT, cases[i].refusal);
        }
        char *values = malloc(700001);
        for (int i = 0; i < 350000; i++) memcpy(values + 2 * i, i ? ",0" : "[0", 2);
        st_write(files[f], values, 700000); /* a small text that would become a large tree */
        free(values);
        st_refuse(st_path("c"), NULL, AQ_ERR_FORMAT, "more than 300000 JSON values");
        assert_int_equal(truncate(st_path(files[f]), INT64_C(1) << 30), 0); /* 1 GiB: refused before it is read */
        st_refuse(st_path("c"), NULL, AQ_ERR_FORMAT, "over the limit config_bytes of 16,777,216");
        unlink(st_path(files[f]));
        assert_int_equal(mkfifo(st_path(files[f]), 0600), 0);
        st_refuse(st_path("c"), NULL, AQ_ERR_FORMAT, "is a FIFO");
        unlink(st_path(files[f]));
    }
}

/* ---- what must be right ---- */

static void the_sample_model_has_42_layers_in_its_blocks(void **state) {
    (void)state;
    static const char *const layers[] = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"};
    aq_model *model = st_open(AQ_SOURCE_DIR "/examples/dit-fashion", NULL);
    size_t n = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) n += aq_model_tensor(model, i)->role == AQ_ROLE_LAYER;
    assert_int_equal(n, 42);
    for (int block = 0; block < 6; block++) {
        for (size_t k = 0; k < 7; k++) {
            char name[128];
            snprintf(name, sizeof name, "transformer_blocks.%d.%s.weight", block, layers[k]);
            int64_t at = aq_model_find(model, name);
            assert_true(at >= 0);
            assert_int_equal(aq_model_tensor(model, (size_t)at)->role, AQ_ROLE_LAYER);
        }
    }
    assert_string_equal(aq_model_format(model), "diffusers");
    assert_string_equal(aq_model_component(model), "transformer");
    assert_string_equal(aq_model_class(model), "DiTTransformer2DModel");
    assert_string_equal(aq_model_weights_name(model), "diffusion_pytorch_model.safetensors");
    assert_int_equal(aq_model_modality(model), AQ_MODALITY_IMAGE);
    assert_string_equal(aq_model_modality_source(model), "metadata.json");
    assert_int_equal(aq_model_n_warnings(model), 0);
    static const char *const side[] = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"};
    assert_int_equal(aq_model_n_side_files(model), 4);
    for (size_t i = 0; i < 4; i++) {
        const char *absolute;
        assert_string_equal(aq_model_side_file(model, i, &absolute), side[i]);
        assert_true(aq_path_is_file(absolute));
    }
    aq_model_close(model);
}

static void roles_follow_the_names_of_known_architectures(void **state) {
    (void)state;
    const struct {
        const char *name;
        aq_role role;
    } cases[] = {
        {"transformer_blocks.0.attn1.to_q.weight", AQ_ROLE_LAYER},
        {"single_transformer_blocks.7.proj_out.weight", AQ_ROLE_LAYER}, /* Flux: inside a block */
        {"proj_out.weight", AQ_ROLE_KEEP_EDGE},
        {"proj_out_2.weight", AQ_ROLE_KEEP_EDGE},
        {"norm_out.linear.weight", AQ_ROLE_KEEP_EDGE},
        {"down_blocks.0.attentions.1.proj_in.weight", AQ_ROLE_LAYER},
        {"conv_in.weight", AQ_ROLE_KEEP_EDGE},
        {"conv_out.weight", AQ_ROLE_KEEP_EDGE},
        {"model.diffusion_model.input_blocks.0.0.weight", AQ_ROLE_KEEP_EDGE},
        {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight", AQ_ROLE_LAYER},
        {"model.diffusion_model.out.2.weight", AQ_ROLE_KEEP_EDGE},
        {"model.diffusion_model.time_embed.0.weight", AQ_ROLE_KEEP_EMBED},
        {"down_blocks.0.resnets.0.time_emb_proj.weight", AQ_ROLE_LAYER},
        {"x_embedder.weight", AQ_ROLE_KEEP_EMBED},
        {"pos_embed.proj.weight", AQ_ROLE_KEEP_EMBED},
        {"transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", AQ_ROLE_KEEP_EMBED},
        {"double_blocks.0.img_mod.lin.weight", AQ_ROLE_LAYER},
        {"img_in.weight", AQ_ROLE_KEEP_EDGE},
        {"time_in.in_layer.weight", AQ_ROLE_KEEP_EMBED},
        {"final_layer.adaLN_modulation.1.weight", AQ_ROLE_KEEP_EDGE},
        {"model.embed_tokens.weight", AQ_ROLE_KEEP_EMBED},
        {"model.layers.3.mlp.gate_proj.weight", AQ_ROLE_LAYER},
        {"lm_head.weight", AQ_ROLE_KEEP_EDGE},
        {"model.transformer.wte.weight", AQ_ROLE_KEEP_EMBED},
        {"model.transformer.ff_out.weight", AQ_ROLE_KEEP_EDGE},
        {"model.transformer.blocks.0.ff_out.weight", AQ_ROLE_LAYER},
        {"blocks.0.adaln.weight", AQ_ROLE_LAYER},
        {"local.weight", AQ_ROLE_LAYER},
        {"pos.weight", AQ_ROLE_KEEP_EMBED},
        {"tok.weight", AQ_ROLE_KEEP_EMBED},
        {"time1.weight", AQ_ROLE_KEEP_EMBED},
        {"head.weight", AQ_ROLE_KEEP_EDGE},
        {"blocks.0.norm2.weight", AQ_ROLE_KEEP_NORM},
        {"blocks.0.in_proj_weight", AQ_ROLE_KEEP_NAME},
        {"blocks.0.scale_shift_table", AQ_ROLE_KEEP_NAME},
        {"weight", AQ_ROLE_LAYER},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        st_tensor t = {cases[i].name, "BF16", {2, {64, 64}}, NULL};
        aq_model *model = st_open(st_write_tensors("r.safetensors", &t, 1, NULL), NULL);
        if (aq_model_tensor(model, 0)->role != cases[i].role) fail_msg("%s: %s", cases[i].name, aq_role_reason(aq_model_tensor(model, 0)->role));
        aq_model_close(model);
    }
    const struct {
        st_tensor t;
        aq_role role;
    } shapes[] = {{{"b.weight", "F32", {2, {64, 63}}, NULL}, AQ_ROLE_KEEP_SMALL},
                  {{"b.weight", "F32", {1, {8192}}, NULL}, AQ_ROLE_KEEP_RANK},
                  {{"b.weight", "I32", {2, {64, 64}}, NULL}, AQ_ROLE_KEEP_DTYPE},
                  {{"b.weight", "F64", {3, {2, 64, 64}}, NULL}, AQ_ROLE_LAYER}};
    for (size_t i = 0; i < COUNT(shapes); i++) {
        aq_model *model = st_open(st_write_tensors("r.safetensors", &shapes[i].t, 1, NULL), NULL);
        assert_int_equal(aq_model_tensor(model, 0)->role, shapes[i].role);
        aq_model_close(model);
    }
}

static void shards_come_in_order_of_their_names(void **state) {
    (void)state;
    write_shards();
    const char *index = write_index("{\"weight_map\":{\"b.weight\":\"" SHARD2 "\",\"a.bias\":\"" SHARD1 "\",\"a.weight\":\"" SHARD1 "\"}}");
    static const char *const names[] = {"a.weight", "a.bias", "b.weight"};
    const char *paths[] = {index, st_path("s")}; /* the index, and the folder that holds it */
    for (size_t p = 0; p < 2; p++) {
        aq_model *model = st_open(paths[p], NULL);
        assert_int_equal(aq_model_n_files(model), 2);
        assert_int_equal(aq_model_n_tensors(model), 3);
        assert_int_equal(aq_model_total_bytes(model), 24832);
        for (size_t i = 0; i < 3; i++) assert_string_equal(aq_model_tensor(model, i)->name, names[i]);
        assert_int_equal(aq_model_tensor(model, 2)->file_index, 1);
        assert_string_equal(aq_model_weights_name(model), "m.safetensors");
        assert_string_equal(aq_model_format(model), p == 0 ? "sharded safetensors" : "folder");
        assert_int_equal(aq_model_check_unchanged(model, &st_error), AQ_OK);
        aq_model_close(model);
    }
    unlink(index); /* numbered shards speak for themselves, when all are there */
    aq_model_close(st_open(st_path("s"), NULL));
    unlink(st_path("s/" SHARD2));
    st_refuse(st_path("s"), NULL, AQ_ERR_FORMAT, "1 of 2 shards");
    st_write_tensors("s/m-00002-of-00003.safetensors", g_other, 1, NULL);
    st_refuse(st_path("s"), NULL, AQ_ERR_FORMAT, "m-00002-of-00003.safetensors is a shard of another set, expected one of 2");
}

static void a_plain_folder_may_spread_a_model_over_files(void **state) {
    (void)state;
    st_write_text("p/metadata.json", "{\"modality\":\"audio\"}");
    st_write_text("p/notes.txt", "x");
    st_write_tensors("p/a.safetensors", g_two, 2, NULL);
    st_write_tensors("p/b.safetensors", g_other, 1, NULL);
    aq_model *model = st_open(st_path("p"), NULL);
    assert_string_equal(aq_model_format(model), "folder");
    assert_int_equal(aq_model_n_tensors(model), 3);
    assert_int_equal(aq_model_modality(model), AQ_MODALITY_AUDIO);
    assert_int_equal(aq_model_n_side_files(model), 1);
    assert_string_equal(aq_model_side_file(model, 0, NULL), "notes.txt");
    aq_model_close(model);
    st_write_tensors("p/b.safetensors", g_two, 2, NULL);
    st_refuse(st_path("p"), NULL, AQ_ERR_FORMAT, "2 tensors are in two files");
}

#define INDEX_SD                                                                                                                                               \
    "{\"_class_name\":\"StableDiffusionPipeline\",\"unet\":[\"diffusers\",\"UNet2DConditionModel\"],\"vae\":[\"diffusers\",\"AutoencoderKL\"],"                \
    "\"safety_checker\":[null,null],\"requires_safety_checker\":true}"
static void write_diffusers(void) {
    st_write_text("d/model_index.json", INDEX_SD);
    st_write_text("d/unet/config.json", "{\"_class_name\":\"UNet2DConditionModel\"}");
    st_write_tensors("d/unet/diffusion_pytorch_model.safetensors", g_two, 2, NULL);
    st_write_text("d/vae/config.json", "{\"_class_name\":\"AutoencoderKL\"}");
    st_write_tensors("d/vae/diffusion_pytorch_model.safetensors", g_other, 1, NULL);
    st_write_text("d/vae/diffusion_pytorch_model.bin", "pickle");
    st_write_text("d/vae/tokenizer/vocab.json", "{}");
    st_write_text("d/.git/config", "x");
    st_write_text("d/images/example.png", "x");
    st_write_tensors("d/checkpoint.safetensors", g_two, 2, NULL); /* the same again as one file */
}

static void a_component_of_a_diffusers_folder_is_chosen(void **state) {
    (void)state;
    aq_model_options options = defaults();
    write_diffusers();
    aq_model *model = st_open(st_path("d"), NULL);
    assert_string_equal(aq_model_component(model), "unet");
    assert_string_equal(aq_model_class(model), "UNet2DConditionModel");
    assert_int_equal(aq_model_modality(model), AQ_MODALITY_IMAGE);
    assert_string_equal(aq_model_modality_source(model), "model_index.json class StableDiffusionPipeline");
    static const char *const side[] = {"model_index.json", "unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
                                       "vae/tokenizer/vocab.json"};
    assert_int_equal(aq_model_n_side_files(model), COUNT(side));
    for (size_t i = 0; i < COUNT(side); i++) assert_string_equal(aq_model_side_file(model, i, NULL), side[i]);
    aq_model_close(model);
    options.component = "vae";
    model = st_open(st_path("d"), &options);
    assert_string_equal(aq_model_tensor(model, 0)->name, "b.weight");
    aq_model_close(model);
    static const char *const wrong[] = {"transformer", "../d/unet", "safety_checker", "_class_name", "images", ""};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        options.component = wrong[i];
        st_refuse(st_path("d"), &options, i == 2 ? AQ_ERR_FORMAT : AQ_ERR_USAGE, i == 2 ? "its folder is missing" : "there are: \"unet\", \"vae\"");
    }
    st_write_text("e/model_index.json", "{\"vae\":[\"diffusers\",\"AutoencoderKL\"]}");
    st_refuse(st_path("e"), NULL, AQ_ERR_USAGE, "no denoiser (component transformer or unet); there are: \"vae\"");
    options.component = "unet";
    st_write_tensors("f/model.safetensors", g_two, 2, NULL);
    st_refuse(st_path("f"), &options, AQ_ERR_USAGE, "no model_index.json");
}

static void the_modality_is_told_or_unknown(void **state) {
    (void)state;
    const struct {
        const char *index, *config, *metadata, *weights;
        aq_modality modality;
        const char *source;
    } cases[] = {
        {NULL, "{\"_class_name\":\"DiTTransformer2DModel\"}", NULL, NULL, AQ_MODALITY_IMAGE, "config.json class DiTTransformer2DModel"},
        {NULL, "{\"_class_name\":\"StableAudioDiTModel\"}", NULL, NULL, AQ_MODALITY_AUDIO, "config.json"},
        {NULL, "{\"_class_name\":\"FluxTransformer2DModel\"}", NULL, NULL, AQ_MODALITY_IMAGE, "config.json"},
        {NULL, "{\"_class_name\":\"UNet2DConditionModel\"}", NULL, NULL, AQ_MODALITY_UNKNOWN, ""}, /* images, or sound in AudioLDM */
        {NULL, "{\"_class_name\":\"CogVideoXTransformer3DModel\"}", NULL, NULL, AQ_MODALITY_UNKNOWN, ""},
        {NULL, "{\"architectures\":[\"LLaDAModelLM\"],\"model_type\":\"llada\"}", NULL, NULL, AQ_MODALITY_TEXT, "config.json class LLaDAModelLM"},
        {NULL, "{\"architectures\":[\"DreamModel\"],\"model_type\":\"Dream\"}", NULL, NULL, AQ_MODALITY_TEXT, "config.json"},
        {NULL, "{\"model_type\":\"mdlm\"}", NULL, NULL, AQ_MODALITY_TEXT, "config.json class mdlm"},
        {NULL, "{\"architectures\":[\"DiffuCoderModel\"]}", NULL, NULL, AQ_MODALITY_CODE, "config.json"},
        {NULL, "{\"model_type\":\"something\"}", NULL, NULL, AQ_MODALITY_UNKNOWN, ""},
        {NULL, "{\"_class_name\":[1],\"architectures\":{},\"model_type\":3}", NULL, NULL, AQ_MODALITY_UNKNOWN, ""},
        {NULL, "{\"_class_name\":\"DiTTransformer2DModel\"}", "{\"modality\":\"code\"}", "{\"modality\":\"audio\"}", AQ_MODALITY_CODE, "metadata.json"},
        {NULL, NULL, NULL, "{\"modality\":\"audio\"}", AQ_MODALITY_AUDIO, "safetensors __metadata__ modality"},
        {NULL, NULL, NULL, "{\"modality\":\"Audio\"}", AQ_MODALITY_UNKNOWN, ""},
        {NULL, NULL, NULL, "{\"modelspec.architecture\":\"stable-diffusion-xl-v1-base\"}", AQ_MODALITY_IMAGE, "safetensors __metadata__"},
        {NULL, NULL, "{\"other\":1}", NULL, AQ_MODALITY_UNKNOWN, ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char dir[16], name[64];
        snprintf(dir, sizeof dir, "m%zu", i);
        snprintf(name, sizeof name, "%s/model.safetensors", dir);
        st_write_tensors(name, g_two, 2, cases[i].weights);
        snprintf(name, sizeof name, "%s/config.json", dir);
        if (cases[i].config) st_write_text(name, cases[i].config);
        snprintf(name, sizeof name, "%s/metadata.json", dir);
        if (cases[i].metadata) st_write_text(name, cases[i].metadata);
        aq_model_options options = defaults();
        aq_model *model = st_open(st_path(dir), &options);
        if (aq_model_modality(model) != cases[i].modality || !strstr(aq_model_modality_source(model), cases[i].source))
            fail_msg("case %zu: %s from %s", i, aq_modality_name(aq_model_modality(model)), aq_model_modality_source(model));
        aq_model_close(model);
        options.require_modality = true;
        if (cases[i].modality == AQ_MODALITY_UNKNOWN) {
            st_refuse(st_path(dir), &options, AQ_ERR_FORMAT, "'text', 'code', 'image', 'audio'");
            assert_non_null(strstr(st_error.message, "metadata"));
        }
        options.modality = AQ_MODALITY_TEXT; /* what is given counts */
        model = st_open(st_path(dir), &options);
        assert_int_equal(aq_model_modality(model), AQ_MODALITY_TEXT);
        assert_string_equal(aq_model_modality_source(model), "option");
        aq_model_close(model);
    }
    st_write_text("m0/metadata.json", "{\"modality\":\"smell\"}");
    st_refuse(st_path("m0"), NULL, AQ_ERR_FORMAT, "modality is \"smell\", expected 'text', 'code', 'image' or 'audio'");
}

static void a_container_is_named_with_the_commands_that_read_it(void **state) {
    (void)state;
    st_write_text("c/metadata.json", "{\"modality\":\"image\"}");
    st_write_text("c/model-00001-of-00001.parquet", "PAR1");
    st_refuse(st_path("c"), NULL, AQ_ERR_FORMAT, "container");
    assert_non_null(strstr(st_error.hint, "export"));
    st_write_text("g/model-Q4_0.gguf", "GGUF");
    st_refuse(st_path("g"), NULL, AQ_ERR_FORMAT, "GGUF");
    st_write_text("n/readme.txt", "x");
    st_refuse(st_path("n"), NULL, AQ_ERR_FORMAT, "no .safetensors weights");
}

static void the_fingerprint_follows_the_files(void **state) {
    (void)state;
    char first[33], again[33], other[33];
    const char *path = st_write_tensors("x/model.safetensors", g_two, 2, NULL);
    struct timespec times[2] = {{1000, 0}, {1000, 0}};
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    for (int i = 0; i < 2; i++) {
        aq_model *model = st_open(path, NULL);
        aq_model_fingerprint(model, i == 0 ? first : again);
        aq_model_close(model);
    }
    assert_string_equal(first, again);
    assert_int_equal(strlen(first), 32);
    times[1].tv_sec++;
    assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
    aq_model *model = st_open(path, NULL);
    aq_model_fingerprint(model, other);
    aq_model_close(model);
    assert_string_not_equal(first, other);
}

/* FA07: whichever allocation fails, the answer is "out of memory", and the sanitizer build sees no leak. */
static void FA07_open_survives_each_failed_allocation(void **state) {
    (void)state;
    write_diffusers();
    write_shards();
    write_index("{\"weight_map\":{" MAP "},\"metadata\":{\"total_size\":1}}");
    float one = 1;
    st_tensor fp8[] = {{"a.weight", "F8_E4M3", {2, {4, 4}}, NULL}, {"a.scale_weight", "F32", {0, {0}}, &one}};
    st_write_tensors("fp8.safetensors", fp8, 2, NULL);
    st_write_text("u/config.json", "{}");
    st_write_tensors("u/a.safetensors", g_two, 2, NULL);
    st_write_tensors("u/b.safetensors", g_two, 2, NULL);
    static const char *const paths[] = {"d", "s", "s/m.safetensors.index.json", "fp8.safetensors", "u", "gone"};
    for (size_t p = 0; p < COUNT(paths); p++) {
        char *path = strdup(st_path(paths[p]));
        for (int64_t n = 0;; n++) {
            aq_model *model;
            assert_true(n < 10000);
            aq_mem_fail_after(n);
            aq_status status = aq_model_open(&model, path, NULL, &st_error);
            if (status == AQ_OK) status = aq_model_case_clash(model, &st_error);
            float out[16];
            if (status == AQ_OK) status = aq_model_read_f32(model, 0, 0, 16, out, &st_error);
            if (status == AQ_OK) status = aq_model_check_unchanged(model, &st_error);
            aq_mem_fail_after(-1);
            aq_model_close(model);
            if (status != AQ_ERR_MEMORY) {
                assert_int_equal(status, p == 4 ? AQ_ERR_USAGE : p == 5 ? AQ_ERR_IO : AQ_OK);
                break;
            }
        }
        free(path);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(IX01_a_shard_is_one_plain_file_name),
        TEST(IX02_a_link_is_followed_unless_forbidden),
        TEST(IX03_a_shard_that_is_no_regular_file_is_refused),
        TEST(IX04_index_and_shards_must_agree),
        TEST(IX04_an_index_of_wrong_form_is_refused),
        TEST(IX05_a_wrong_total_size_is_a_warning),
        TEST(IX06_names_that_differ_only_in_case_are_found),
        TEST(IX07_of_several_sets_of_weights_none_is_guessed),
        TEST(IX07_a_lone_variant_is_no_ambiguity),
        TEST(IX08_pickle_is_never_read),
        TEST(IX09_quantized_weights_are_refused_by_kind),
        TEST(IX09_fp8_with_a_scale_is_multiplied_by_it),
        TEST(IX09_a_scale_without_its_weight_is_refused_and_the_reverse),
        TEST(IX10_a_malformed_config_is_refused),
        TEST(the_sample_model_has_42_layers_in_its_blocks),
        TEST(roles_follow_the_names_of_known_architectures),
        TEST(shards_come_in_order_of_their_names),
        TEST(a_plain_folder_may_spread_a_model_over_files),
        TEST(a_component_of_a_diffusers_folder_is_chosen),
        TEST(the_modality_is_told_or_unknown),
        TEST(a_container_is_named_with_the_commands_that_read_it),
        TEST(the_fingerprint_follows_the_files),
        TEST(FA07_open_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
