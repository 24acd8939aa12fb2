//! The executor with real processes and a store that records, refuses or stalls.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use async_channel::Sender;
use rustix::process::{Pid, Signal, kill_process};

use super::setup::Setup;
use super::*;
use crate::limits::{CHUNK_BYTES_MAX, LOOK_REST, STORE_GIVE_UP};

#[derive(Default)]
struct FakeStore {
    chunks: RefCell<[Vec<Vec<u8>>; 2]>,
    /// Appends still to be refused.
    refusals: Cell<u32>,
    appends: Cell<u32>,
    times: RefCell<Vec<Instant>>,
    /// An append takes so long.
    pause: Cell<Duration>,
    /// Appends wait for a token of this channel, if there is one.
    gate: RefCell<Option<Receiver<()>>>,
}

impl FakeStore {
    fn bytes(&self, stream: Stream) -> Vec<u8> {
        self.chunks.borrow()[stream.index()].concat()
    }

    fn text(&self, stream: Stream) -> String {
        String::from_utf8(self.bytes(stream)).expect("text")
    }
}

impl OutputStore for FakeStore {
    async fn append(
        &self,
        stream: Stream,
        first_sequence: u64,
        batch: ChunkBatch,
    ) -> Result<ChunkBatch, ChunkBatch> {
        let gate = self.gate.borrow().clone();
        if let Some(gate) = gate {
            let _ = gate.recv().await;
        }
        if !self.pause.get().is_zero() {
            Timer::after(self.pause.get()).await;
        }
        self.appends.set(self.appends.get() + 1);
        self.times.borrow_mut().push(Instant::now());
        if self.refusals.get() > 0 {
            self.refusals.set(self.refusals.get() - 1);
            return Err(batch);
        }
        let mut chunks = self.chunks.borrow_mut();
        let chunks = &mut chunks[stream.index()];
        assert_eq!(
            first_sequence,
            chunks.len() as u64 + 1,
            "sequence without holes"
        );
        chunks.extend(batch.iter().map(|chunk| chunk.to_vec()));
        Ok(batch)
    }
}

/// As another agent's for each caller: tests run at once and must not end each other's tasks.
pub fn host(leftovers: Leftovers) -> Rc<Host> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let agent = format!("test-{}-{number}", std::process::id());
    Rc::new(Host::new(&agent, leftovers, Setup::default()))
}

pub fn spec(command: &str) -> Spec {
    Spec {
        host: host(Leftovers::Kill),
        ids: Ids::new("task-1", "attempt-1").expect("short"),
        command: command.into(),
        timeout: None,
        kill_grace: Duration::from_millis(200),
        flush: Flush {
            interval: Duration::from_millis(20),
            threshold: CHUNK_BYTES_MAX,
        },
        tail_bytes: 1024,
        output_max: None,
    }
}

fn controls() -> (Sender<Stop>, Controls) {
    let (stop, stopped) = async_channel::bounded(1);
    let controls = Controls {
        stop: stopped,
        watched: Rc::new(Cell::new(true)),
    };
    (stop, controls)
}

fn run_spec(spec: Spec, store: &FakeStore) -> Ended {
    let (_stop, controls) = controls();
    smol::block_on(run(spec, store, controls, |_| {}))
}

fn run_sh(command: &str) -> (Ended, FakeStore) {
    let store = FakeStore::default();
    let ended = run_spec(spec(command), &store);
    (ended, store)
}

#[test]
fn both_streams_and_the_exit_status_arrive() {
    let (ended, store) = run_sh("echo out; echo err >&2; exit 3");
    assert_eq!(store.text(Stream::Stdout), "out\n");
    assert_eq!(store.text(Stream::Stderr), "err\n");
    assert_eq!(ended.status(), (FinalStatus::Failed, 3));
    assert_eq!(ended.reason().as_deref(), Some("exit status 3"));
    assert_eq!(ended.last_sequence, [1, 1]);
    assert_eq!(ended.stdout.bytes, b"out\n");
}

#[test]
fn a_script_runs_by_its_own_interpreter_line() {
    let (ended, store) = run_sh("#!/bin/cat -n\nline\n");
    assert_eq!(ended.cause, Cause::Exited(0));
    let numbered = "     1\t#!/bin/cat -n\n     2\tline\n";
    assert_eq!(store.text(Stream::Stdout), numbered);
    let (ended, _) = run_sh("#!/no/such/interpreter\n");
    assert!(
        matches!(&ended.cause, Cause::NotStarted(why) if why.contains("/no/such/interpreter")),
        "{ended:?}"
    );
    assert_eq!(ended.status(), (FinalStatus::Failed, -1));
}

#[test]
fn the_task_sees_its_environment_and_nothing_of_the_agent() {
    let (_, store) = run_sh("env; echo ---; cat");
    let text = store.text(Stream::Stdout);
    let (env, stdin) = text.split_once("---\n").expect("separator");
    assert_eq!(stdin, "");
    let mut names: Vec<_> = env
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, _)| name)
        .filter(|name| !matches!(*name, "PWD" | "OLDPWD" | "SHLVL" | "_"))
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "HOME",
            "HOSTLINK_ATTEMPT_ID",
            "HOSTLINK_TASK_ID",
            "HOSTLINK_TASK_MARK",
            "LANG",
            "PATH",
            "SHELL",
            "TERM",
            "USER"
        ]
    );
    assert!(env.contains("HOSTLINK_TASK_ID=task-1\n"), "{env}");
}

#[test]
fn a_task_has_no_descriptor_of_the_agent_but_its_script() {
    const LIST: &str = "for fd in /proc/$$/fd/*; do readlink $fd; done";
    // What this process was given without asking, and passes on, is seen by any child of it.
    let any_child = std::process::Command::new("/bin/sh")
        .args(["-c", LIST])
        .output()
        .expect("runs");
    let foreign = String::from_utf8(any_child.stdout).expect("text");
    let store = FakeStore::default();
    let (stop, first_controls) = controls();
    let (started, is_started) = async_channel::bounded(1);
    let other_task = run(spec("sleep 1000"), &store, first_controls, |pid| {
        started.try_send(pid).expect("first start")
    });
    let listing = async {
        is_started.recv().await.expect("started");
        let store = FakeStore::default();
        let (_stop, controls) = controls();
        run(spec(LIST), &store, controls, |_| {}).await;
        let reason = "enough".to_owned();
        stop.try_send(Stop { reason }).expect("room");
        store.text(Stream::Stdout)
    };
    let (_, text) = smol::block_on(future::zip(other_task, listing));
    let (pipes, others): (Vec<_>, Vec<_>) = text
        .lines()
        .filter(|target| !foreign.lines().any(|line| line == *target))
        .partition(|target| target.starts_with("pipe:"));
    assert_eq!(pipes.len(), 2, "stdout and stderr: {text}");
    for target in others {
        assert!(target.starts_with("/memfd:hostlink-task"), "{text}");
    }
    assert!(text.starts_with("/dev/null\n"), "{text}");
}

#[test]
fn a_task_begins_with_no_signal_blocked_and_pipe_ends_noticed() {
    // Not of the shell: dash blocks all signals around the start of a program.
    let (_, store) = run_sh("exec cat /proc/self/status");
    let text = store.text(Stream::Stdout);
    let mask = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.expect("is there").trim(), 16).expect("a mask")
    };
    assert_eq!(mask("SigBlk:"), 0);
    let pipe = 1 << (rustix::process::Signal::PIPE.as_raw() - 1);
    assert_eq!(mask("SigIgn:") & pipe, 0, "{text}");
}

#[test]
fn a_large_command_needs_no_argument_list() {
    let command = format!(": '{}'\necho done", "x".repeat(1_000_000));
    let (ended, store) = run_sh(&command);
    assert_eq!(ended.cause, Cause::Exited(0));
    assert_eq!(store.text(Stream::Stdout), "done\n");
}

#[test]
fn bulk_output_is_exact_and_in_full_chunks() {
    let (ended, store) = run_sh("head -c 3000000 /dev/zero | tr '\\0' '\\377'");
    assert_eq!(ended.cause, Cause::Exited(0));
    let bytes = store.bytes(Stream::Stdout);
    assert_eq!(bytes.len(), 3_000_000);
    assert!(bytes.iter().all(|&byte| byte == 0xff));
    assert_eq!(ended.stdout.bytes, vec![0xff; 1024]);
    assert!(ended.stdout.truncated);
    let chunks = store.chunks.borrow();
    assert!(
        chunks[0].len() < 2 * 3_000_000 / CHUNK_BYTES_MAX,
        "{}",
        chunks[0].len()
    );
    assert!(chunks[0].iter().any(|chunk| chunk.len() == CHUNK_BYTES_MAX));
}

#[test]
fn no_chunk_splits_a_character() {
    let mut spec =
        spec("i=0; while [ $i -lt 400 ]; do printf 'a\u{df}\u{20ac}\u{1f980}'; i=$((i+1)); done");
    spec.flush.threshold = 7;
    let store = FakeStore::default();
    run_spec(spec, &store);
    let chunks = store.chunks.borrow();
    assert!(chunks[0].len() > 100);
    for chunk in &chunks[0] {
        assert!(std::str::from_utf8(chunk).is_ok(), "{chunk:x?}");
        assert!(chunk.len() <= 7 + 3, "{}", chunk.len());
    }
    assert_eq!(
        chunks[0].concat(),
        "a\u{df}\u{20ac}\u{1f980}".repeat(400).as_bytes()
    );
}

#[test]
fn an_incomplete_character_at_the_end_is_delivered() {
    let (_, store) = run_sh("printf 'ab\\342\\202'");
    assert_eq!(store.bytes(Stream::Stdout), b"ab\xe2\x82");
}

#[test]
fn refused_chunks_are_kept_and_stored_later_in_order() {
    let store = FakeStore::default();
    store.refusals.set(2);
    let mut spec = spec("echo one; echo two; echo three");
    spec.flush.threshold = 4;
    let ended = run_spec(spec, &store);
    assert_eq!(store.text(Stream::Stdout), "one\ntwo\nthree\n");
    assert_eq!(ended.chunks_given_up, 0);
    assert_eq!(
        ended.last_sequence[0],
        store.chunks.borrow()[0].len() as u64
    );
}

#[test]
fn a_stalled_store_makes_the_child_wait_and_loses_nothing() {
    let store = FakeStore::default();
    let (open, gate) = async_channel::bounded(1);
    *store.gate.borrow_mut() = Some(gate);
    let (_stop, controls) = controls();
    let (started, is_started) = async_channel::bounded(1);
    let task = run(
        spec("head -c 2000000 /dev/zero; echo finished >&2"),
        &store,
        controls,
        |pid| started.try_send(pid).expect("first start"),
    );
    let release = async {
        let pid = is_started.recv().await.expect("started");
        // The child is asleep in its write once the pipe and all buffers are full.
        let stat = format!("/proc/{pid}/task/{pid}/children");
        while std::fs::read_to_string(&stat)
            .unwrap_or_default()
            .is_empty()
        {
            future::yield_now().await;
        }
        let child = std::fs::read_to_string(&stat).expect("children");
        let child = child.trim().to_owned();
        let state = || std::fs::read_to_string(format!("/proc/{child}/wchan")).unwrap_or_default();
        while !state().contains("pipe") {
            Timer::after(Duration::from_millis(1)).await;
        }
        drop(open);
    };
    let (ended, ()) = smol::block_on(future::zip(task, release));
    assert_eq!(ended.cause, Cause::Exited(0));
    assert_eq!(store.bytes(Stream::Stdout).len(), 2_000_000);
    assert!(
        store.appends.get() < 60,
        "several chunks a commit: {}",
        store.appends.get()
    );
}

#[test]
fn a_timeout_ends_the_whole_group_even_if_it_ignores_term() {
    let mut spec = spec("trap '' TERM; echo ready; sleep 1000 & sleep 1000");
    spec.timeout = Some(Duration::from_millis(300));
    let store = FakeStore::default();
    let begun = Instant::now();
    let ended = run_spec(spec, &store);
    assert_eq!(ended.cause, Cause::TimedOut(Duration::from_millis(300)));
    assert_eq!(ended.status(), (FinalStatus::Failed, -1));
    assert_eq!(ended.reason().as_deref(), Some("timed out after 0.3 s"));
    assert_eq!(store.text(Stream::Stdout), "ready\n");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_stop_ends_the_task_with_its_reason() {
    let store = FakeStore::default();
    let (stop, controls) = controls();
    let task = run(spec("sleep 1000"), &store, controls, |_| {
        let reason = "cancelled: test".to_owned();
        stop.try_send(Stop { reason }).expect("room");
    });
    let ended = smol::block_on(task);
    assert_eq!(ended.status(), (FinalStatus::Interrupted, -1));
    assert_eq!(ended.reason().as_deref(), Some("cancelled: test"));
}

#[test]
fn what_a_shell_runs_has_the_grace_to_tidy_up() {
    let store = FakeStore::default();
    let (stop, controls) = controls();
    let tidy = "trap 'sleep 2; echo tidied; exit' TERM; echo ready; while :; do sleep 0.1; done";
    let mut spec = spec(&format!("sh -c \"{tidy}\"; exit 0"));
    spec.kill_grace = Duration::from_secs(10);
    let task = run(spec, &store, controls, |_| {});
    let ended = smol::block_on(future::or(task, async {
        while store.bytes(Stream::Stdout).is_empty() {
            Timer::after(Duration::from_millis(5)).await;
        }
        let reason = "cancelled: test".to_owned();
        stop.try_send(Stop { reason }).expect("room");
        future::pending().await
    }));
    assert_eq!(ended.status(), (FinalStatus::Interrupted, -1));
    assert_eq!(store.text(Stream::Stdout), "ready\ntidied\n");
}

#[test]
fn a_signal_is_told() {
    let (ended, _) = run_sh("kill -9 $$");
    assert_eq!(ended.cause, Cause::Signalled(9));
    assert_eq!(ended.reason().as_deref(), Some("killed by signal 9"));
}

#[test]
fn a_leaked_pipe_does_not_hold_the_task_and_its_holder_is_ended() {
    let begun = Instant::now();
    let (ended, store) = run_sh("sleep 1000 & echo $!; exit 0");
    assert_eq!(ended.cause, Cause::Exited(0));
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let pid = store.text(Stream::Stdout);
    wait_until_gone(pid.trim());
}

#[test]
fn a_leaked_pipe_that_never_runs_empty_does_not_hold_the_task() {
    let store = FakeStore::default();
    store.pause.set(Duration::from_millis(5));
    let begun = Instant::now();
    let ended = run_spec(spec("setsid yes & echo $! >&2"), &store);
    let pid = store.text(Stream::Stderr);
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    let _ = kill_process(pid.expect("a number"), Signal::KILL);
    assert_eq!(ended.cause, Cause::Exited(0));
    assert!(store.bytes(Stream::Stdout).starts_with(b"y\ny\n"));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn the_grace_is_for_the_whole_group_and_ends_with_it() {
    let directory = std::env::temp_dir().join(format!("hostlink-grace-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("own directory");
    let tidied = directory.join("tidied");
    // The shell dies of TERM at once; the program it runs needs longer and holds no pipe. It sleeps
    // little at a time: a child of it that is hit between its fork and its exec does not die of TERM.
    let mut spec = spec(&format!(
        "sh -c 'trap \"sleep 0.3; echo >{}; exit\" TERM; echo ready >&3; exec 3>&-; while :; do sleep 0.05; done' >/dev/null 2>&1; echo after",
        tidied.display()
    ));
    spec.command.splice(0..0, *b"exec 3>&1\n");
    spec.kill_grace = Duration::from_secs(60);
    let store = FakeStore::default();
    let (stop, controls) = controls();
    let begun = Instant::now();
    let (started, is_started) = async_channel::bounded(1);
    let task = run(spec, &store, controls, |_| {
        started.try_send(()).expect("first start")
    });
    let cancel = async {
        is_started.recv().await.expect("started");
        while store.bytes(Stream::Stdout).is_empty() {
            future::yield_now().await;
        }
        let reason = "cancelled: test".to_owned();
        stop.try_send(Stop { reason }).expect("room");
    };
    let (ended, ()) = smol::block_on(future::zip(task, cancel));
    assert!(matches!(ended.cause, Cause::Stopped(_)), "{ended:?}");
    let is_tidied = tidied.exists();
    std::fs::remove_dir_all(&directory).expect("own directory");
    assert!(is_tidied, "killed before its grace was over");
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "no longer than needed"
    );
}

#[test]
fn the_exit_is_noticed_without_a_pidfd() {
    use std::os::unix::process::CommandExt;
    let child = std::process::Command::new("/bin/sh")
        .args(["-c", "sleep 0.05; exit 7"])
        .process_group(0)
        .spawn()
        .expect("starts");
    let spec = spec("");
    let mut group = Group::with(spec.host.clone(), spec.ids.key(), child, None);
    smol::block_on(group.exited());
    let leader = Pid::from_raw(group.id() as i32).expect("not zero");
    assert_eq!(spec.host.living(leader, spec.ids.key(), &[]), []);
    assert_eq!(group.reap().0, Cause::Exited(7));
}

/// A capture with this threshold, below which it is flushed at once or not at all, and the other ends of its channels.
fn capture<'a>(
    threshold: usize,
    tail_bytes: usize,
    ended_at: &'a Cell<Option<Instant>>,
    room: &'a Cell<u64>,
) -> (Capture<'a>, (Sender<()>, Receiver<()>)) {
    let (holding, let_go) = async_channel::bounded(1);
    let (reading, all_read) = async_channel::bounded(1);
    let interval = match threshold {
        CHUNK_BYTES_MAX => Duration::from_secs(3600),
        _ => Duration::ZERO,
    };
    let capture = Capture {
        stream: Stream::Stdout,
        flush: Flush {
            interval,
            threshold,
        },
        tail_bytes,
        watched: Rc::new(Cell::new(true)),
        ended_at,
        let_go,
        reading,
        room,
    };
    (capture, (holding, all_read))
}

#[test]
fn output_is_given_up_when_the_store_stays_away_after_the_end() {
    let store = FakeStore::default();
    store.refusals.set(u32::MAX);
    let long_ago = Instant::now().checked_sub(STORE_GIVE_UP + Duration::from_secs(1));
    let ended_at = Cell::new(Some(long_ago.expect("the machine is up for a minute")));
    let room = Cell::new(u64::MAX);
    let (capture, _others) = capture(1024, 5, &ended_at, &room);
    let (pipe, mut writer) = std::io::pipe().expect("a pipe");
    let text = vec![b'x'; 3 * CHUNK_BYTES_MAX];
    std::io::Write::write_all(&mut writer, &text).expect("fits into a pipe");
    drop(writer);
    let captured = smol::block_on(capture.run(pipe, &store));
    assert_eq!(captured.last_sequence, 0);
    assert_eq!(captured.chunks_given_up, 48, "more than one batch");
    assert_eq!(captured.tail.bytes, b"xxxxx");
    assert_eq!(
        store.appends.get(),
        1,
        "once given up, it is not asked again"
    );
}

/// While a child prints without pause one read fills several buffers, whose borders lie anywhere.
#[test]
fn characters_stay_whole_when_one_read_fills_several_buffers() {
    let text = "a\u{df}\u{20ac}\u{1f980}".repeat(200_000);
    let store = FakeStore::default();
    let ended_at = Cell::new(None);
    let room = Cell::new(u64::MAX);
    let (capture, _others) = capture(CHUNK_BYTES_MAX, 70_000, &ended_at, &room);
    let (pipe, mut writer) = std::io::pipe().expect("a pipe");
    let printed = text.clone();
    let printer = std::thread::spawn(move || {
        std::io::Write::write_all(&mut writer, printed.as_bytes()).expect("it is read");
    });
    let captured = smol::block_on(capture.run(pipe, &store));
    printer.join().expect("prints all");
    let chunks = &store.chunks.borrow()[Stream::Stdout.index()];
    for chunk in chunks {
        assert!(std::str::from_utf8(chunk).is_ok(), "a character is split");
    }
    let stored = store.bytes(Stream::Stdout);
    assert!(
        stored == text.as_bytes(),
        "{} bytes are stored",
        stored.len()
    );
    let fewest = text.len().div_ceil(CHUNK_BYTES_MAX);
    assert!(chunks.len() <= fewest + 2, "{} chunks", chunks.len());
    let kept = &text.as_bytes()[text.len() - 70_000..];
    assert!(kept.ends_with(&captured.tail.bytes) && captured.tail.bytes.len() > 69_990);
}

/// Each byte is written after the one before has been read, so this takes long only if the reader rests.
#[test]
fn who_prints_quickly_is_looked_after_at_rests() {
    let store = FakeStore::default();
    let ended_at = Cell::new(None);
    let room = Cell::new(u64::MAX);
    let (capture, _others) = capture(CHUNK_BYTES_MAX, 5, &ended_at, &room);
    let (pipe, mut writer) = std::io::pipe().expect("a pipe");
    let printer = std::thread::spawn(move || {
        for _ in 0..200 {
            std::io::Write::write_all(&mut writer, b"x").expect("it is read");
            while rustix::io::ioctl_fionread(&writer).expect("a pipe says") > 0 {
                std::thread::yield_now();
            }
            // What a program does between two lines: the reader looks in vain meanwhile.
            std::thread::sleep(Duration::from_micros(10));
        }
    });
    let begun = Instant::now();
    let captured = smol::block_on(capture.run(pipe, &store));
    let elapsed = begun.elapsed();
    printer.join().expect("prints all");
    assert!(elapsed > 50 * LOOK_REST, "{elapsed:?}");
    assert_eq!(captured.last_sequence, 2, "the first byte at once");
    assert_eq!(store.bytes(Stream::Stdout), [b'x'; 200]);
}

#[test]
fn nobody_watches_so_output_is_flushed_seldom() {
    // Of a task that prints all the time: until `is_enough` of the pauses between flushes.
    let pauses = |watched: bool, is_enough: fn(&[Duration]) -> bool| {
        let store = FakeStore::default();
        let (_stop, controls) = controls();
        controls.watched.set(watched);
        let lines = spec("while :; do echo line; sleep 0.01; done");
        let prints = async {
            run(lines, &store, controls, |_| {}).await;
            unreachable!("it prints without end");
        };
        let looks = async {
            for _ in 0..6_000 {
                let times = store.times.borrow().clone();
                let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
                if is_enough(&pauses) {
                    return pauses;
                }
                Timer::after(Duration::from_millis(10)).await;
            }
            panic!("{:?}", store.times.borrow());
        };
        smol::block_on(future::or(prints, looks))
    };
    // However busy the machine is, nothing comes early, and of what is due every 20 ms two come
    // soon after one another at last.
    const SOON: Duration = Duration::from_millis(500);
    let seldom = pauses(false, |pauses| pauses.len() == 2);
    assert!(seldom.iter().all(|pause| *pause > SOON), "{seldom:?}");
    pauses(true, |pauses| pauses.iter().any(|pause| *pause < SOON));
}

/// Returns once the process is gone, or a zombie that its new parent has still to collect.
fn wait_until_gone(pid: &str) {
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    while !(stat().is_empty() || stat().contains(") Z ")) {
        std::thread::yield_now();
    }
}

#[test]
fn dropping_a_running_task_kills_its_group_and_leaves_no_zombie() {
    let store = FakeStore::default();
    let (_stop, controls) = controls();
    let pid = Cell::new(0);
    let (started, is_started) = async_channel::bounded(1);
    let task = run(spec("sleep 1000"), &store, controls, |id| {
        pid.set(id);
        started.try_send(()).expect("first start");
    });
    smol::block_on(future::or(
        async {
            task.await;
        },
        async {
            is_started.recv().await.expect("started");
        },
    ));
    // A machine under load may need longer than the drop waits: then the next task collects it.
    let stat = format!("/proc/{}/stat", pid.get());
    while std::path::Path::new(&stat).exists() {
        assert!(
            !std::fs::read_to_string(&stat)
                .unwrap_or_default()
                .contains(") S ")
        );
        process::collect_dropped();
        std::thread::yield_now();
    }
}

#[test]
fn output_over_the_bound_is_drained_and_the_tail_goes_on() {
    let store = FakeStore::default();
    let spec = Spec {
        output_max: Some(100_001),
        ..spec("seq 1 200000; seq 1 200000 >&2; printf '\u{20ac}end'; exit 4")
    };
    let ended = run_spec(spec, &store);
    assert_eq!(ended.cause, Cause::Exited(4));
    let stored = store.bytes(Stream::Stdout).len() + store.bytes(Stream::Stderr).len();
    assert_eq!(stored, 100_001);
    assert!(ended.is_cut && ended.stdout.truncated && ended.stderr.truncated);
    assert!(
        ended
            .stdout
            .bytes
            .ends_with("200000\n\u{20ac}end".as_bytes())
    );
    assert!(ended.stderr.bytes.ends_with(b"200000\n"));
}

/// Runs a task whose output nobody takes until `is_over` says so of its leader. The second value:
/// nothing had been taken by then.
fn run_stalled(spec: Spec, store: &FakeStore, is_over: impl Fn(Pid) -> bool) -> (Ended, bool) {
    let (gate, tokens) = async_channel::bounded(1);
    *store.gate.borrow_mut() = Some(tokens);
    let (_stop, controls) = controls();
    let (started, is_started) = async_channel::bounded(1);
    let running = run(spec, store, controls, |pid| {
        started.try_send(pid).expect("first start")
    });
    let watching = async {
        let pid = is_started.recv().await.expect("started");
        let leader = Pid::from_raw(pid as i32).expect("not zero");
        while !is_over(leader) {
            Timer::after(Duration::from_millis(5)).await;
        }
        let stalled = store.appends.get() == 0;
        drop(gate);
        stalled
    };
    smol::block_on(future::zip(running, watching))
}

#[test]
fn a_stalled_store_does_not_hold_a_task_whose_output_is_cut() {
    let store = FakeStore::default();
    let spec = Spec {
        output_max: Some(50_000),
        ..spec("head -c 20000000 /dev/zero; echo drained >&2")
    };
    let (ended, _) = run_stalled(spec, &store, |leader| {
        procfs::find(leader).is_some_and(|it| it.is_dead)
    });
    assert_eq!(ended.cause, Cause::Exited(0));
    assert_eq!(store.bytes(Stream::Stdout).len(), 50_000);
    assert!(ended.is_cut);
}

#[test]
fn a_cut_falls_between_characters() {
    let store = FakeStore::default();
    let spec = Spec {
        output_max: Some(10),
        ..spec("printf '\u{20ac}\u{20ac}\u{20ac}\u{20ac}\u{20ac}'")
    };
    let ended = run_spec(spec, &store);
    assert_eq!(store.text(Stream::Stdout), "\u{20ac}\u{20ac}\u{20ac}");
    assert!(ended.stdout.truncated && !ended.stderr.truncated);
}

#[test]
fn a_task_whose_pipe_is_full_is_ended_while_the_store_stalls() {
    let store = FakeStore::default();
    let spec = Spec {
        timeout: Some(Duration::from_millis(300)),
        ..spec("trap '' TERM; yes 0123456789abcdef & yes >&2")
    };
    let (ended, stalled) = run_stalled(spec, &store, |leader| {
        let group = procfs::all();
        let mut group = group.iter().filter(|it| it.group == leader.as_raw_pid());
        group.all(|it| it.is_dead)
    });
    assert!(stalled, "the group was ended before the store went on");
    assert!(matches!(ended.cause, Cause::TimedOut(_)), "{ended:?}");
    assert!(
        store
            .bytes(Stream::Stdout)
            .starts_with(b"0123456789abcdef\n")
    );
}
