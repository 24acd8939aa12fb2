use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::net::testing::{self, TempDir, run};

async fn load(directory: &Path) -> Result<Identity, IdentityError> {
    let key = directory.join("agent.key");
    let fingerprint = directory.join("fingerprint.json");
    Identity::load_or_create(directory, &key, &fingerprint).await
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("read")).expect("JSON")
}

#[test]
fn what_is_created_is_found_again() {
    let directory = TempDir::new();
    let state = directory.path().join("new/state");
    run(async {
        let mut first = load(&state).await.expect("created");
        assert_eq!(first.agent_id(), None);
        assert!(first.signer(clock()).is_none());
        first.store_agent_id("agent-1").await.expect("stored");
        assert_eq!(first.agent_id(), Some("agent-1"));
        let again = load(&state).await.expect("loaded");
        assert_eq!(again.agent_id(), Some("agent-1"));
        assert_eq!(again.fingerprint(), first.fingerprint());
        assert_eq!(again.public_key_base64(), first.public_key_base64());
        assert_eq!(again.signer(clock()).expect("signer").agent_id(), "agent-1");
    });
    let key = state.join("agent.key");
    let mode = std::fs::metadata(&key).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let pem = std::fs::read(&key).expect("key");
    let rsa = openssl::rsa::Rsa::private_key_from_pem(&pem).expect("as OpenSSL reads it");
    let same = rsa.private_key_to_pem().expect("PEM");
    assert!(pem == same, "PKCS#1, as OpenSSL writes it");
    let fingerprint = json(&state.join("fingerprint.json"));
    let uuid = fingerprint["fingerprint"].as_str().expect("text");
    assert_eq!(find_uuid(uuid.as_bytes()).as_deref(), Some(uuid));
    assert_eq!(&uuid[14..15], "4");
}

fn clock() -> ServerClock {
    ServerClock::new(&testing::url("http://a"))
}

#[test]
fn files_of_an_existing_agent_are_taken_over_with_their_other_keys() {
    let directory = TempDir::new();
    let pkcs8 = testing::key().private_key_to_pem_pkcs8().expect("PEM");
    directory.file("agent.key", &pkcs8);
    directory.file("agent.json", br#"{"agent_id":"old","since":5}"#);
    directory.file(
        "fingerprint.json",
        br#"{"fingerprint":"device-7","mac":"x"}"#,
    );
    run(async {
        let mut identity = load(directory.path()).await.expect("loaded");
        assert_eq!(identity.agent_id(), Some("old"));
        assert_eq!(identity.fingerprint(), "device-7");
        let der = testing::key().public_key_to_der().expect("der");
        assert_eq!(identity.public_key_base64(), BASE64.encode(der));
        identity.store_agent_id("new").await.expect("stored");
    });
    let agent = json(&directory.path().join("agent.json"));
    assert_eq!(agent, serde_json::json!({"agent_id": "new", "since": 5}));
    let key = std::fs::read(directory.path().join("agent.key")).expect("key");
    assert_eq!(key, pkcs8, "never written again");
}

#[test]
fn a_damaged_key_is_an_error_and_stays_as_it_is() {
    let rsa = openssl::rsa::Rsa::generate(2048).expect("key");
    let pem = rsa.private_key_to_pem().expect("PEM");
    let mut wrong_inside = rsa.private_key_to_der().expect("DER");
    // In the modulus. (OpenSSL makes up for a damaged private factor: such a key works.)
    wrong_inside[40] ^= 1;
    let wrong_inside = format!(
        "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n",
        BASE64.encode(wrong_inside)
    );
    let group = openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::X9_62_PRIME256V1);
    let curve = openssl::ec::EcKey::generate(&group.expect("group")).expect("key");
    let curve = PKey::from_ec_key(curve)
        .expect("key")
        .private_key_to_pem_pkcs8();
    let check = |content: &[u8], expected: &str| {
        let directory = TempDir::new();
        let path = directory.file("agent.key", content);
        match run(load(directory.path())) {
            Err(IdentityError::BadKey(text)) => {
                assert!(text.contains(&path.display().to_string()), "{text}");
                assert!(text.contains(expected), "{text}");
            }
            other => panic!("expected a bad key ({expected}), got {other:?}"),
        }
        assert_eq!(std::fs::read(&path).expect("key"), content);
    };
    check(b"", "no PEM private key");
    check(&pem[..pem.len() / 2], "no PEM private key");
    check(wrong_inside.as_bytes(), "does not fit");
    check(&curve.expect("PEM"), "no RSA key");
    check(&[b'x'; 100_000], "larger than");
    let locked = rsa.private_key_to_pem_passphrase(openssl::symm::Cipher::aes_128_cbc(), b"secret");
    check(&locked.expect("PEM"), "no PEM private key");
}

#[test]
fn damaged_json_files_do_not_take_the_device_away() {
    let directory = TempDir::new();
    directory.file("agent.json", b"{\"agent_id\":\"a");
    directory.file(
        "fingerprint.json",
        b"{\"fingerprint\":\"0b6c4f2e-1111-4222-8333-944455566677\"\0\0\0",
    );
    run(async {
        let identity = load(directory.path()).await.expect("loaded");
        assert_eq!(identity.agent_id(), None, "registers again");
        assert_eq!(
            identity.fingerprint(),
            "0b6c4f2e-1111-4222-8333-944455566677",
            "found in the damaged file"
        );
        directory.file("fingerprint.json", b"\0\0\0");
        let identity = load(directory.path()).await.expect("loaded");
        let stored = json(&directory.path().join("fingerprint.json"));
        assert_eq!(stored["fingerprint"], identity.fingerprint());
    });
    for kept in ["agent.json.damaged", "fingerprint.json.damaged"] {
        assert!(directory.path().join(kept).exists(), "{kept}");
    }
}

#[test]
fn values_of_a_wrong_kind_count_as_missing() {
    let directory = TempDir::new();
    directory.file("agent.json", br#"{"agent_id":7}"#);
    directory.file("fingerprint.json", br#"{"fingerprint":"a\nb","mac":"x"}"#);
    let identity = run(load(directory.path())).expect("loaded");
    assert_eq!(identity.agent_id(), None);
    let stored = json(&directory.path().join("fingerprint.json"));
    assert_eq!(stored["fingerprint"], identity.fingerprint());
    assert_eq!(stored["mac"], "x");
}

#[test]
fn an_id_that_could_not_be_a_header_is_refused() {
    let directory = TempDir::new();
    run(async {
        let mut identity = load(directory.path()).await.expect("created");
        for bad in ["", "a b", "a|b", "a\r\nX: y", "\u{e9}", &"x".repeat(257)] {
            identity.store_agent_id(bad).await.expect_err(bad);
            assert_eq!(identity.agent_id(), None);
        }
    });
}

#[test]
fn where_nothing_can_be_written_the_identity_is_kept_in_memory() {
    let directory = TempDir::new();
    // A directory below a file can be made by nobody, not even by root.
    let blocked = directory.file("file", b"").join("state");
    let key = directory.file(
        "agent.key",
        &testing::key()
            .rsa()
            .expect("RSA")
            .private_key_to_pem()
            .expect("PEM"),
    );
    run(async {
        let fingerprint = blocked.join("fingerprint.json");
        let mut identity = Identity::load_or_create(&blocked, &key, &fingerprint)
            .await
            .expect("in memory");
        assert!(is_usable_name(identity.fingerprint()));
        let error = identity
            .store_agent_id("agent-1")
            .await
            .expect_err("not stored");
        assert!(matches!(error, IdentityError::NotStored(_)));
        assert_eq!(identity.agent_id(), Some("agent-1"));
    });
}
