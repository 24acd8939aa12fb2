//! TLS in front of the scripted server, with a certificate authority made for the test.

use std::path::PathBuf;

use async_native_tls::TlsAcceptor;
use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::pkcs12::Pkcs12;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::extension::{BasicConstraints, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder};
use smol::net::{TcpListener, TcpStream};

const PASSWORD: &str = "test";

pub struct TestCa {
    key: PKey<Private>,
    certificate: X509,
}

impl TestCa {
    pub fn new(name: &str) -> TestCa {
        let key = new_key();
        let name = name_of(name);
        let mut builder = builder(&name, &name, &key, 1);
        let constraints = BasicConstraints::new().critical().ca().build();
        let usage = KeyUsage::new().critical().key_cert_sign().build();
        builder
            .append_extension(constraints.expect("valid"))
            .expect("extension");
        builder
            .append_extension(usage.expect("valid"))
            .expect("extension");
        builder.sign(&key, MessageDigest::sha256()).expect("signed");
        TestCa {
            certificate: builder.build(),
            key,
        }
    }

    /// Writes the certificate as PEM for `HOSTLINK_CA_FILE`.
    pub fn write_pem(&self, path: PathBuf) -> String {
        let pem = self.certificate.to_pem().expect("PEM");
        std::fs::write(&path, pem).expect("the test's directory is writable");
        path.display().to_string()
    }

    /// PKCS#12 of a server certificate for 127.0.0.1 and localhost.
    fn server_identity(&self) -> Vec<u8> {
        let (key, certificate) = self.certify(Flaw::None);
        let mut identity = Pkcs12::builder();
        identity.pkey(&key).cert(&certificate);
        let identity = identity.build2(PASSWORD).expect("PKCS#12");
        identity.to_der().expect("DER")
    }

    /// A server that shows such a certificate.
    pub fn acceptor(&self, flaw: Flaw) -> SslAcceptor {
        let (key, certificate) = self.certify(flaw);
        let method = SslMethod::tls_server();
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(method).expect("an acceptor");
        acceptor.set_private_key(&key).expect("a key");
        acceptor.set_certificate(&certificate).expect("its own");
        acceptor.build()
    }

    fn certify(&self, flaw: Flaw) -> (PKey<Private>, X509) {
        let key = new_key();
        let subject = name_of("scripted server");
        let issuer = match flaw {
            Flaw::SelfSigned => &*subject,
            _ => self.certificate.subject_name(),
        };
        let mut builder = builder(&subject, issuer, &key, 2);
        let mut names = SubjectAlternativeName::new();
        match flaw {
            Flaw::OtherName => names.dns("somebody.example"),
            _ => names.ip("127.0.0.1").dns("localhost"),
        };
        let names = names.build(&builder.x509v3_context(Some(&self.certificate), None));
        builder
            .append_extension(names.expect("valid"))
            .expect("extension");
        let (from, to) = match flaw {
            Flaw::Expired => (Asn1Time::from_unix(0), Asn1Time::from_unix(1_000_000_000)),
            Flaw::NotYetValid => (Asn1Time::days_from_now(1), Asn1Time::days_from_now(2)),
            _ => (Asn1Time::from_unix(0), Asn1Time::days_from_now(2)),
        };
        let dated = builder.set_not_before(&from.expect("a date"));
        dated.expect("a date");
        let dated = builder.set_not_after(&to.expect("a date"));
        dated.expect("a date");
        let signer = match flaw {
            Flaw::SelfSigned => &key,
            _ => &self.key,
        };
        builder
            .sign(signer, MessageDigest::sha256())
            .expect("signed");
        (key, builder.build())
    }
}

/// What is wrong with a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    Expired,
    NotYetValid,
    OtherName,
    SelfSigned,
}

fn new_key() -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(2048).expect("a key")).expect("a key")
}

fn name_of(common_name: &str) -> X509Name {
    let mut name = X509NameBuilder::new().expect("a name");
    name.append_entry_by_text("CN", common_name)
        .expect("a name");
    name.build()
}

fn builder(
    subject: &openssl::x509::X509NameRef,
    issuer: &openssl::x509::X509NameRef,
    key: &PKey<Private>,
    serial: u32,
) -> X509Builder {
    let build = || -> Result<X509Builder, openssl::error::ErrorStack> {
        let mut builder = X509Builder::new()?;
        builder.set_version(2)?;
        builder.set_subject_name(subject)?;
        builder.set_issuer_name(issuer)?;
        builder.set_pubkey(key)?;
        let serial = BigNum::from_u32(serial)?.to_asn1_integer()?;
        builder.set_serial_number(&serial)?;
        let (from, to) = (Asn1Time::from_unix(0)?, Asn1Time::days_from_now(2)?);
        builder.set_not_before(&from)?;
        builder.set_not_after(&to)?;
        Ok(builder)
    };
    build().expect("a certificate")
}

/// Accepts TLS on a port of its own and passes all bytes to `plain_port`. Lives as long as the
/// process of the tests.
pub fn terminate(ca: &TestCa, plain_port: u16) -> u16 {
    let identity = ca.server_identity();
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("a bound socket").port();
    std::thread::spawn(move || {
        let executor = smol::LocalExecutor::new();
        smol::block_on(executor.run(async {
            let listener = smol::Async::new(listener).expect("a listener");
            let listener = TcpListener::from(listener);
            let acceptor = TlsAcceptor::new(identity.as_slice(), PASSWORD)
                .await
                .expect("the identity was just made");
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                executor
                    .spawn(async move { pass(&acceptor, socket, plain_port).await })
                    .detach();
            }
        }));
    });
    port
}

/// A client that does not trust us ends its handshake with an error, which is its own affair.
async fn pass(acceptor: &TlsAcceptor, socket: TcpStream, plain_port: u16) {
    let Ok(outer) = acceptor.accept(socket).await else {
        return;
    };
    let Ok(inner) = TcpStream::connect(("127.0.0.1", plain_port)).await else {
        return;
    };
    let (outer_read, outer_write) = smol::io::split(outer);
    let (inner_read, inner_write) = smol::io::split(inner);
    let inwards = smol::io::copy(outer_read, inner_write);
    let outwards = smol::io::copy(inner_read, outer_write);
    let _ = smol::future::race(inwards, outwards).await;
}
