//! What a task finds when its user, directory, umask and niceness are set.

use hostlink_edge::ids::FinalStatus;

use crate::support::{Agent, ScriptedServer, Task};

const PROBE: &str = "id -u; id -g; id -G; umask; pwd; nice; cat /proc/self/oom_score_adj; \
    grep -E '^Sig(Blk|Ign)' /proc/self/status | cut -f2; echo $HOME $USER; ls -l /proc/self/fd | grep -c report; \
    env | grep -c BLOCKING";

fn run(server: &ScriptedServer, name: &str, command: &str) -> (FinalStatus, String, String) {
    let task = Task::new(name, command);
    server.deliver(&task);
    let end = server.wait_end(&task);
    (end.status, end.output, end.error)
}

fn is_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can test {what}");
    }
    root
}

#[test]
fn a_task_runs_as_its_user_in_its_directory() {
    if !is_root("HOSTLINK_TASK_USER") {
        return;
    }
    let server = ScriptedServer::start();
    let agent = Agent::with(
        &server,
        &[
            ("HOSTLINK_TASK_USER", "daemon"),
            ("HOSTLINK_TASK_DIR", "/usr/share"),
            ("HOSTLINK_TASK_UMASK", "027"),
            ("HOSTLINK_TASK_NICE", "7"),
        ],
    );
    let (status, text, error) = run(&server, "probe", PROBE);
    server.check_eq(
        status,
        FinalStatus::Failed,
        &format!("grep finds nothing: {error}"),
    );
    let lines: Vec<&str> = text.lines().collect();
    let passwd = std::fs::read_to_string("/etc/passwd").expect("readable");
    let entry = passwd.lines().find(|line| line.starts_with("daemon:"));
    let fields: Vec<&str> = entry.expect("every system has it").split(':').collect();
    let expected = [
        fields[2],
        fields[3],
        fields[3],
        "0027",
        "/usr/share",
        "7",
        "500",
        "0000000000000000",
    ];
    server.check_eq(&lines[..8], expected.as_slice(), "surroundings");
    let ignored = u64::from_str_radix(lines[8], 16).expect("hexadecimal");
    // Behind 31 stand those of threads, which whoever started the tests may ignore.
    server.check_eq(ignored & 0x7fff_ffff, 0, "ignored signals");
    server.check_eq(lines[9], format!("{} daemon", fields[5]).as_str(), "names");
    let of_the_helper = ["0", "0"];
    server.check_eq(
        &lines[10..],
        of_the_helper.as_slice(),
        "files and variables",
    );
    let (status, text, _) = run(
        &server,
        "streams",
        "echo out > /dev/stdout; echo err > /dev/stderr; kill -0 $PPID 2>/dev/null || echo spared",
    );
    server.check_eq(
        status,
        FinalStatus::Completed,
        "its own streams can be opened",
    );
    server.check_eq(text.as_str(), "out\nspared\n", "streams");
    let adj = format!("/proc/{}/oom_score_adj", agent.pid());
    let adj = std::fs::read_to_string(adj).expect("readable");
    server.check_eq(adj.trim(), "0", "the agent's own place");
}

#[test]
fn a_number_is_a_user_too() {
    if !is_root("HOSTLINK_TASK_USER") {
        return;
    }
    let server = ScriptedServer::start();
    let _agent = Agent::with(&server, &[("HOSTLINK_TASK_USER", "12345:54321")]);
    let (_, text, error) = run(&server, "probe", "id -u; id -g; id -G; echo $HOME $USER");
    server.check_eq(text.as_str(), "12345\n54321\n54321\n/ 12345\n", &error);
}

#[test]
fn a_task_never_runs_as_somebody_else_instead() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_USER", "no-such-user")]);
    agent.wait_line("no user `no-such-user`");
    let trace = agent.trace("ran");
    let (status, _, error) = run(&server, "unknown", &trace);
    server.check_eq(status, FinalStatus::Failed, "end");
    server.check(error.contains("no-such-user"), &error);
    server.check_eq(agent.runs("ran"), 0, "runs");
}

#[test]
fn a_directory_that_is_missing_is_told() {
    let server = ScriptedServer::start();
    let agent = Agent::with(&server, &[("HOSTLINK_TASK_DIR", "/no/such/directory")]);
    let (status, _, error) = run(&server, "nowhere", &agent.trace("ran"));
    server.check_eq(status, FinalStatus::Failed, "end");
    server.check(
        error.contains("HOSTLINK_TASK_DIR /no/such/directory"),
        &error,
    );
    server.check_eq(agent.runs("ran"), 0, "runs");
}

#[test]
fn a_program_that_is_missing_is_told_through_the_helper() {
    let server = ScriptedServer::start();
    let _agent = Agent::with(&server, &[("HOSTLINK_TASK_NICE", "1")]);
    let (status, _, error) = run(&server, "missing", "#!/no/such/program\n");
    server.check_eq(status, FinalStatus::Failed, "end");
    server.check(
        error.contains("cannot run /no/such/program: No such file"),
        &error,
    );
    let (_, text, _) = run(&server, "nice", "nice; exit 127");
    server.check_eq(
        text.as_str(),
        "1\n",
        "a status of its own is no failure of the helper",
    );
}
