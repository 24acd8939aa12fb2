//! The storage thread by itself.

use super::support::{Directory, run};
use crate::gateway::delivery::TaskRecord;
use crate::gateway::journal::{self, Header, Kind};
use crate::gateway::store::{Answer, Append, Opened, Store};

pub fn task() -> TaskRecord {
    TaskRecord {
        task_id: "t".into(),
        attempt_id: "a".into(),
        agent_id: "agent".into(),
        command: "true".into(),
        priority: 0,
        timeout_seconds: None,
        number: 1,
        created_at: String::new(),
    }
}

pub fn open(directory: &Directory) -> Opened {
    Store::open(&directory.0, None, true).unwrap()
}

pub async fn close(opened: Opened) {
    opened.store.close();
    assert!(opened.failure.recv().await.is_err(), "it ended well");
}

async fn append(store: &Store, offset: u64, kind: Kind) -> Answer<()> {
    let mut records = Vec::new();
    journal::append(&mut records, Header::plain(kind, b""), b"");
    let append = Append {
        key: task().key(),
        offset,
        records,
    };
    let done = store.append(vec![append]).await?;
    done.recv().await.unwrap()
}

#[test]
fn nothing_is_appended_behind_a_hole() {
    run(async |_| {
        let directory = Directory::new();
        let opened = open(&directory);
        let store = &opened.store;
        let length = store.create_task(task()).await.unwrap();
        assert!(store.create_task(task()).await.is_err(), "its id is taken");
        // As if an append of one byte before this one had failed.
        let hole = append(store, length + 1, Kind::Started).await;
        assert!(hole.is_err());
        append(store, length, Kind::Received).await.unwrap();
        let repeated = append(store, length, Kind::Started).await;
        assert!(repeated.is_err());
        let loaded = store.load("t").await.unwrap().unwrap();
        assert_eq!(loaded.length, length + 32);
        assert_eq!(loaded.attempt.info().status, "received");
        assert!(store.load("nothing").await.unwrap().is_none());
        close(opened).await;
    });
}

#[test]
fn only_tasks_without_a_final_are_read_at_start() {
    run(async |_| {
        let directory = Directory::new();
        let opened = open(&directory);
        let token = opened.token.clone();
        let mut ended = task();
        ended.task_id = "u".into();
        opened.store.create_task(task()).await.unwrap();
        let offset = opened.store.create_task(ended.clone()).await.unwrap();
        let mut records = Vec::new();
        let result = br#"{"status":"completed"}"#;
        journal::append(&mut records, Header::plain(Kind::Final, result), result);
        let key = ended.key();
        let last = Append {
            key,
            offset,
            records,
        };
        // The index is not told: as if the power had gone right after the journal was synced.
        let done = opened.store.append(vec![last]).await.unwrap();
        done.recv().await.unwrap().unwrap();
        close(opened).await;

        for _ in 0..2 {
            let opened = open(&directory);
            assert_eq!(opened.token, token);
            let open: Vec<_> = opened.open.iter().map(|l| &l.attempt.task).collect();
            assert_eq!(open, [&task()]);
            let loaded = opened.store.load("u").await.unwrap().unwrap();
            assert_eq!(loaded.attempt.info().status, "completed");
            close(opened).await;
        }
    });
}

#[test]
fn a_second_gateway_on_the_same_state_is_refused() {
    run(async |_| {
        let directory = Directory::new();
        let opened = open(&directory);
        let error = Store::open(&directory.0, None, true).err().unwrap();
        assert!(error.contains("another gateway"), "{error}");
        close(opened).await;
        close(open(&directory)).await;
    });
}
