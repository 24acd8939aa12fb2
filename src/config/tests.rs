use super::*;

/// Settings of an environment; the file does not exist.
fn loaded(pairs: &[(&str, &str)]) -> Loaded {
    let environment = pairs
        .iter()
        .map(|(key, value)| (OsString::from(key), OsString::from(value)));
    load(environment, None)
}

const URL: (&str, &str) = ("SH_CONTROL_PLANE_URL", "https://cp.example/");

#[test]
fn defaults_are_those_of_the_documentation() {
    let loaded = loaded(&[URL]);
    assert_eq!(loaded.warnings, []);
    let config = loaded.config.expect("usable");
    assert_eq!(config.control_plane_url, "https://cp.example");
    assert_eq!(
        config.local_store_path,
        Path::new("/var/lib/hostlink/outbox")
    );
    assert_eq!(config.spool_cap_bytes, 64 << 20);
    assert_eq!(config.terminal_reserve_bytes, 1 << 20);
    assert_eq!(config.heartbeat_interval, Duration::from_secs(5));
    assert_eq!(config.flush_interval, Duration::from_millis(100));
    assert_eq!(config.final_output_bytes, 65_536);
    assert_eq!(config.task_timeout, None);
    assert_eq!(loaded.settings.len(), keys::KEYS.len());
}

#[test]
fn only_the_url_is_fatal() {
    for url in [
        "",
        "cp.example",
        "ftp://cp",
        "https://",
        "http://u:p@cp",
        "http://a b",
        "http://h:99999",
        "http://h?query",
    ] {
        let loaded = loaded(&[("SH_CONTROL_PLANE_URL", url)]);
        assert!(loaded.config.is_err(), "{url:?}");
        assert_eq!(loaded.local.spool_cap_bytes, 64 << 20, "{url:?}");
    }
}

#[test]
fn bad_values_are_clamped_or_defaulted_with_a_warning_that_names_them() {
    let check = |key: &str, value: &str, effective: &str, range: &str| {
        let loaded = loaded(&[URL, (key, value)]);
        assert!(loaded.config.is_ok());
        assert_eq!(
            loaded.warnings.len(),
            1,
            "{key}={value}: {:?}",
            loaded.warnings
        );
        let warning = &loaded.warnings[0].0;
        for part in [key, value, range, effective] {
            assert!(warning.contains(part), "{part:?} is not in {warning:?}");
        }
        let setting = loaded.settings.iter().find(|setting| setting.key == key);
        assert_eq!(setting.expect("known key").value, effective);
    };
    check("HOSTLINK_WS_PING_INTERVAL", "1s", "5s", "5s to 5m");
    check("HOSTLINK_WS_PING_INTERVAL", "1h", "5m", "5s to 5m");
    check(
        "HOSTLINK_WS_PING_INTERVAL",
        "30",
        "30s",
        "100ms, 30s, 5m or 1h (5s to 5m)",
    );
    check("HOSTLINK_TASK_CONCURRENCY", "9", "4", "1 to 4");
    check("HOSTLINK_TASK_CONCURRENCY", "-1", "1", "number (1 to 4)");
    let heartbeat = "HOSTLINK_HEARTBEAT_INTERVAL";
    check(heartbeat, "never", "5s", "0 for off or a duration");
    check(heartbeat, "never", "5s", "(10ms to 5m)");
    check("HOSTLINK_WS_ENABLED", "maybe", "true", "true/1/yes");
    check("HOSTLINK_LOCAL_STORE", "tape", "disk", "disk or memory");
    check("HOSTLINK_LOG", "loud", "info", "trace");
    check(
        "HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES",
        "1",
        "1048576",
        "68719476736",
    );
    check("HOSTLINK_WS_URL", "http://x", "", "ws://");
}

#[test]
fn a_number_that_no_integer_holds_is_out_of_range_and_not_unreadable() {
    let check = |key: &str, value: &str, effective: &str| {
        let loaded = loaded(&[URL, (key, value)]);
        let [warning] = loaded.warnings.as_slice() else {
            panic!("{key}={value}: {:?}", loaded.warnings);
        };
        let expected = format!("{key}={value} is out of range (");
        assert!(warning.0.starts_with(&expected), "{warning}");
        let setting = loaded.settings.iter().find(|setting| setting.key == key);
        assert_eq!(setting.expect("known key").value, effective);
    };
    let digits = "9".repeat(40);
    let hours = format!("{digits}h");
    check(
        "HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES",
        &digits,
        "68719476736",
    );
    check("HOSTLINK_TASK_CONCURRENCY", &digits, "4");
    check("HOSTLINK_WS_PING_INTERVAL", &hours, "5m");
    // Fits an integer, but not in milliseconds.
    check("HOSTLINK_WS_PING_INTERVAL", "18446744073709551615h", "5m");
    // A limit that was asked for must not become none.
    check("HOSTLINK_TASK_TIMEOUT", &hours, "87840h");
}

#[test]
fn a_client_key_without_a_certificate_is_told() {
    let key = ("HOSTLINK_CLIENT_KEY", "/etc/device.key");
    let certificate = ("HOSTLINK_CLIENT_CERT", "/etc/device.pem");
    let alone = loaded(&[URL, key]).warnings;
    assert_eq!(alone.len(), 1, "{alone:?}");
    for part in [key.0, key.1, certificate.0] {
        assert!(alone[0].0.contains(part), "{}", alone[0]);
    }
    assert_eq!(loaded(&[URL, key, certificate]).warnings, []);
    // One file may hold both.
    assert_eq!(loaded(&[URL, certificate]).warnings, []);
}

#[test]
fn contradictions_are_clamped_with_a_warning() {
    let loaded = loaded(&[
        URL,
        ("HOSTLINK_LOCAL_STORE_SPOOL_CAP_BYTES", "1048576"),
        ("HOSTLINK_TASK_FINAL_OUTPUT_BYTES", "1048576"),
        ("HOSTLINK_WS_RECONNECT_MIN", "2m"),
        ("HOSTLINK_WS_RECONNECT_MAX", "3s"),
    ]);
    assert_eq!(loaded.warnings.len(), 2, "{:?}", loaded.warnings);
    let config = loaded.config.expect("usable");
    assert_eq!(config.terminal_reserve_bytes, 524_288);
    assert!(2 * config.final_output_bytes as u64 + 8192 <= config.terminal_reserve_bytes);
    assert_eq!(config.ws_reconnect_max, Duration::from_secs(120));
}

#[test]
fn unknown_keys_of_ours_are_typing_errors() {
    let loaded = loaded(&[URL, ("HOSTLINK_TASK_TIMOUT", "5s"), ("OTHER_KEY", "x")]);
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].0.contains("HOSTLINK_TASK_TIMOUT"));
}

#[test]
fn zero_switches_heartbeats_off() {
    let config = loaded(&[URL, ("HOSTLINK_HEARTBEAT_INTERVAL", "0s")]).config;
    assert_eq!(config.expect("usable").heartbeat_interval, Duration::ZERO);
}

#[test]
fn secrets_are_never_shown() {
    let loaded = loaded(&[
        URL,
        ("HOSTLINK_TOKEN_KEY", "s3cret"),
        ("HTTPS_PROXY", "http://user:s3cret@proxy:3128"),
    ]);
    let shown = format!(
        "{:?} {:?}",
        loaded.settings,
        loaded.config.expect("usable").token_key
    );
    assert!(!shown.contains("s3cret"), "{shown}");
    assert!(shown.contains("@proxy:3128"));
}

#[test]
fn the_environment_wins_over_the_file() {
    let dir = std::env::temp_dir().join(format!("hostlink-config-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    let file = dir.join("hostlink.env");
    let text = "# comment\nexport SH_CONTROL_PLANE_URL=\"https://file.example\"\n\
                HOSTLINK_LOG='debug' # why\nHOSTLINK_TASK_POLL_INTERVAL = 20s # slow\nnonsense\n";
    std::fs::write(&file, text).expect("file");
    let environment = [("HOSTLINK_LOG".into(), "warn".into())];
    let loaded = load(environment.into_iter(), Some(&file));
    std::fs::remove_dir_all(&dir).expect("clean up");
    assert_eq!(loaded.warnings.len(), 1, "{:?}", loaded.warnings);
    assert!(loaded.warnings[0].0.contains("line 5"));
    let config = loaded.config.expect("usable");
    assert_eq!(config.control_plane_url, "https://file.example");
    assert_eq!(config.log, LevelFilter::Warn);
    assert_eq!(config.task_poll_interval, Duration::from_secs(20));
    let source = |key: &str| {
        let found = loaded.settings.iter().find(|setting| setting.key == key);
        found.expect("known key").source
    };
    assert_eq!(source("HOSTLINK_LOG"), Source::Environment);
    assert_eq!(source("SH_CONTROL_PLANE_URL"), Source::File);
    let missing = load(std::iter::empty(), Some(&file));
    assert!(missing.config.is_err());
    assert!(missing.warnings[0].0.contains("hostlink.env"));
}

/// The outcome of a file of these bytes, with an empty environment.
fn of_file(name: &str, bytes: &[u8]) -> Loaded {
    let dir = std::env::temp_dir().join(format!("hostlink-config-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    let file = dir.join("hostlink.env");
    std::fs::write(&file, bytes).expect("file");
    let loaded = load(std::iter::empty(), Some(&file));
    std::fs::remove_dir_all(&dir).expect("clean up");
    loaded
}

#[test]
fn a_file_of_another_system_does_not_take_the_url_away() {
    let bytes = b"\xef\xbb\xbfSH_CONTROL_PLANE_URL=https://cp\r\n# gr\xfc\xdfe\r\n";
    let marked = of_file("marked", bytes);
    assert_eq!(marked.warnings, []);
    assert_eq!(
        marked.config.expect("usable").control_plane_url,
        "https://cp"
    );
    let broken = of_file(
        "broken",
        b"HOSTLINK_LOG=\xff\nSH_CONTROL_PLANE_URL=https://cp\n",
    );
    assert_eq!(broken.warnings.len(), 1, "{:?}", broken.warnings);
    assert!(broken.warnings[0].0.contains("line 1"));
    assert!(broken.config.is_ok());
    let large = of_file("large", "\u{fc}\n".repeat(100_000).as_bytes());
    assert!(large.warnings[0].0.contains("larger than 262144"));
}

#[test]
fn lines_are_read_as_a_shell_reads_them() {
    let check = |line: &str, value: &str| {
        let loaded = of_file("line", format!("{line}\n").as_bytes());
        assert_eq!(loaded.warnings, [], "{line}");
        let found = loaded.settings.iter().find(|it| it.key == "NO_PROXY");
        assert_eq!(found.expect("known key").value, value, "{line}");
    };
    check("NO_PROXY=a", "a");
    check("  export NO_PROXY = a b ", "a b");
    check("NO_PROXY=a # why", "a");
    check("NO_PROXY=a\t# why", "a");
    check("NO_PROXY= # why", "");
    check("NO_PROXY=#a#b", "#a#b");
    check("NO_PROXY='a # b'", "a # b");
    check("NO_PROXY='a\\b'", "a\\b");
    check(r#"NO_PROXY="a\"b\\c\d" # why"#, r#"a"b\c\d"#);
    check("NO_PROXY=a'b'\"c\"d", "abcd");
    check(r"NO_PROXY=a\#b\ c", "a#b c");
    for unreadable in [
        "NO_PROXY='a",
        "NO_PROXY=\"a",
        "NO_PROXY=a\\",
        "NO PROXY=a",
        "=a",
    ] {
        let loaded = of_file("line", unreadable.as_bytes());
        assert_eq!(loaded.warnings.len(), 1, "{unreadable}");
    }
}

#[test]
fn a_database_of_the_existing_agent_is_left_alone() {
    let dir = std::env::temp_dir().join(format!("hostlink-config-db-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    let database = dir.join("outbox");
    std::fs::write(&database, "").expect("file");
    let loaded = loaded(&[URL, ("HOSTLINK_STATE_PATH", dir.to_str().expect("text"))]);
    std::fs::remove_dir_all(&dir).expect("clean up");
    let beside = dir.join("outbox.d");
    assert_eq!(loaded.local.local_store_path, beside);
    let setting = loaded
        .settings
        .iter()
        .find(|it| it.key == "HOSTLINK_LOCAL_STORE_PATH");
    assert_eq!(
        setting.expect("known key").value,
        beside.to_str().expect("text")
    );
}

#[test]
fn durations_survive_showing_and_reading() {
    for text in ["100ms", "30s", "5m", "1h", "0", "90s", "1500ms"] {
        let duration = values::duration(text).expect(text);
        assert_eq!(
            values::duration(&values::show_duration(duration)),
            Some(duration)
        );
    }
    for text in ["", "s", "5", "5 d", "-1s", "1.5s", "99999999999999999999"] {
        assert_eq!(values::duration(text), None, "{text}");
    }
}

#[test]
fn bounds_of_tasks_are_off_unless_they_are_given() {
    let config = loaded(&[URL]).config.expect("usable");
    let bounds = (
        config.task_output_max,
        config.task_memory_max,
        config.task_pids_max,
        config.task_cpu_max,
    );
    assert_eq!(bounds, (None, None, None, None));
    assert_eq!((config.task_umask, config.task_nice), (None, None));
    assert!(config.task_cgroup && !config.task_leftovers_keep);

    let given = loaded(&[
        URL,
        ("HOSTLINK_TASK_OUTPUT_MAX", "5000"),
        ("HOSTLINK_TASK_MEMORY_MAX", "33554432"),
        ("HOSTLINK_TASK_PIDS_MAX", "0"),
        ("HOSTLINK_TASK_CPU_MAX", "150"),
        ("HOSTLINK_TASK_UMASK", "027"),
        ("HOSTLINK_TASK_NICE", "19"),
        ("HOSTLINK_TASK_LEFTOVERS", "keep"),
    ]);
    assert_eq!(given.warnings, []);
    let config = given.config.expect("usable");
    assert_eq!(config.task_output_max, Some(5000));
    assert_eq!(config.task_memory_max, Some(33_554_432));
    assert_eq!(
        (config.task_pids_max, config.task_cpu_max),
        (None, Some(150))
    );
    assert_eq!(
        (config.task_umask, config.task_nice),
        (Some(0o27), Some(19))
    );
    assert!(config.task_leftovers_keep);
}

#[test]
fn bounds_of_tasks_that_cannot_be_meant_are_told() {
    let check = |key: &str, value: &str, effective: &str, warning: &str| {
        let loaded = loaded(&[URL, (key, value)]);
        let [found] = loaded.warnings.as_slice() else {
            panic!("{key}={value}: {:?}", loaded.warnings);
        };
        assert!(
            found.0.contains(key) && found.0.contains(warning),
            "{found}"
        );
        let setting = loaded.settings.iter().find(|setting| setting.key == key);
        assert_eq!(setting.expect("known key").value, effective);
    };
    // A bound that was asked for must not become none.
    check("HOSTLINK_TASK_MEMORY_MAX", "5", "1048576", "out of range");
    check(
        "HOSTLINK_TASK_PIDS_MAX",
        "99999999",
        "4194304",
        "out of range",
    );
    check("HOSTLINK_TASK_MEMORY_MAX", "32M", "0", "number of bytes");
    check("HOSTLINK_TASK_CPU_MAX", "half", "0", "percent of one CPU");
    check("HOSTLINK_TASK_UMASK", "029", "", "octal");
    check("HOSTLINK_TASK_UMASK", "1000", "", "0 to 777");
    check("HOSTLINK_TASK_NICE", "-5", "", "0 to 19");
    check("HOSTLINK_TASK_LEFTOVERS", "burn", "kill", "kill or keep");
}
