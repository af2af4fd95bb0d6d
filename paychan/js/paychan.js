// Pays HTTP requests over a payment channel (RBPCP), as a plug-in for @x402/fetch and for mppx.
//
// The channel signs a payment for the sum that the server has, plus the price. The sum that the server has is its mark.
// It moves by receipts, and by a proof that is signed by the key of the channel. So an answer that asks again and again
// gets the same payment again. Amounts are whole satoshi. README.md describes the use, ../protocol/bindings/ the wire
// formats.

import * as secp256k1 from "@noble/secp256k1";
import { hmac } from "@noble/hashes/hmac.js";
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex, concatBytes, hexToBytes } from "@noble/hashes/utils.js";

secp256k1.hashes.sha256 = sha256;
secp256k1.hashes.hmacSha256 = (key, message) => hmac(sha256, key, message);

export const SCHEME = "batch-settlement";
export const TRANSFER_METHOD = "bitcoin-channel";
export const BINDING = "bitcoin-channel-v1";
/** CAIP-2 id of each network. */
export const CHAINS = Object.freeze({
  mainnet: "bip122:000000000019d6689c085ae165831e93",
  testnet: "bip122:000000000933ea01ad0ee984209779ba",
  testnet4: "bip122:00000000da84f2bafbbc53dee25a72ae",
  signet: "bip122:00000008819873e925422c1ff0f99f7c",
  regtest: "bip122:0f9188f13cb7b2c71f2a335e3a4fc328",
});
/** Hash flags: SINGLE|ANYONECANPAY of a payment with change, NONE|ANYONECANPAY of one without. */
export const WITH_CHANGE = 0x83,
  WITHOUT_CHANGE = 0x82;

const MAX_MONEY_SAT = 2_100_000_000_000_000;
const UNITS = ["request", "byte", "kilobyte", "second", "event", "token"];
const IDENTIFIER = "payment-identifier";
const SPARE_SECONDS = 60; // least time before the settlement period for which a channel must still take payments
const LEASE_SECONDS = 60; // longest wait for an answer while the channel is locked

/**
 * @typedef {{changeSat: string, sighash: number, signature: string}} Proof  a payment, as the wire shows it
 * @typedef {{channel: string, capacitySat: number, acceptedSat: number, creditSat: number, proof: ?Proof}} State
 * @typedef {{amountSat: number, unit: string, chain: string, identity: string, payUrl: string, openPriceSat: number,
 *   minConfirmations: number, settlementPeriodSeconds: number, dustSat: number, suggestedDepositSat: ?number,
 *   state: ?State}} Offer
 * @typedef {{serverKey: string, expiry: number, outpoint: string, fundingSat: number, changeScript: string,
 *   dustSat: number, payUrl: string, network: string, settlementPeriodSeconds: number}} Facts  keys and script as hex;
 *   `network` is `live`, `test` or `regtest`: the one of its addresses
 * @typedef {Facts & {privateKey: string, changeSat: number, acceptedSat?: number, creditSat?: number}} ChannelJSON
 */

/** A refusal. `code` is stable; `fields` holds the numbers of its text. */
export class PaychanError extends Error {
  constructor(code, text, fields = {}) {
    super(text);
    this.name = "PaychanError";
    this.code = code;
    this.fields = fields;
  }
}

const malformed = (field, want) => new PaychanError("malformed_payment", `${field}: want ${want}`, { field });

// --- pure part: script, digest, signature ----------------------------------------------------------------------------

const hash256 = (bytes) => sha256(sha256(bytes));

/** Little-endian bytes of a number below 2^53. */
function littleEndian(number, size) {
  const bytes = new Uint8Array(size);
  for (let index = 0, rest = number; index < size; index++, rest = Math.floor(rest / 256)) bytes[index] = rest % 256;
  return bytes;
}

function hexOf(text, field, least, most = least) {
  if (typeof text !== "string" || !/^(?:[0-9a-f]{2})*$/.test(text) || text.length < 2 * least || text.length > 2 * most)
    throw malformed(field, `lower-case hex digits of ${least} to ${most} bytes`);
  return hexToBytes(text);
}

function keyOf(text, field) {
  const key = hexOf(text, field, 33);
  if (!secp256k1.utils.isValidPublicKey(key, true)) throw malformed(field, "a compressed point on secp256k1");
  return key;
}

/** Redeem script of a channel: `IF <S> CHECKSIGVERIFY ELSE <E> CLTV DROP ENDIF <C> CHECKSIG` (RBPCP §2). */
export function redeemScript(serverKey, clientKey, expiry) {
  let number = littleEndian(expiry, 5); // the shortest script number: a 0 follows a byte whose top bit is set
  while (number.at(-1) === 0 && number.at(-2) < 0x80) number = number.slice(0, -1);
  return concatBytes(
    new Uint8Array([0x63, 33]),
    serverKey,
    new Uint8Array([0xad, 0x67, number.length]),
    number,
    new Uint8Array([0xb1, 0x75, 0x68, 33]),
    clientKey,
    new Uint8Array([0xac]),
  );
}

/**
 * Digest that the client signs for a payment (RBPCP §3): the legacy hash of a transaction with one input. With change
 * it has one output. Without change it has none; SINGLE would hash to the constant 1, so the flag is NONE.
 */
export function paymentDigest(script, outpoint, changeScript, changeSat) {
  const [txid, index] = outpoint.split(":");
  const output =
    changeSat === 0
      ? [new Uint8Array([0])]
      : [new Uint8Array([1]), littleEndian(changeSat, 8), new Uint8Array([changeScript.length]), changeScript];
  return hash256(
    concatBytes(
      new Uint8Array([1, 0, 0, 0, 1]),
      hexToBytes(txid).reverse(),
      littleEndian(Number(index), 4),
      new Uint8Array([script.length]),
      script,
      new Uint8Array([255, 255, 255, 255]),
      ...output,
      new Uint8Array([0, 0, 0, 0, changeSat === 0 ? WITHOUT_CHANGE : WITH_CHANGE, 0, 0, 0]),
    ),
  );
}

/** Write a signature of 64 bytes as DER (BIP66). */
export function toDer(compact) {
  const integers = [compact.slice(0, 32), compact.slice(32)].map((bytes) => {
    const start = Math.min(bytes.findIndex((byte) => byte !== 0) >>> 0, 31);
    const short = bytes.slice(start);
    return short[0] < 0x80 ? short : concatBytes(new Uint8Array([0]), short);
  });
  const body = concatBytes(...integers.flatMap((bytes) => [new Uint8Array([2, bytes.length]), bytes]));
  return concatBytes(new Uint8Array([0x30, body.length]), body);
}

/** Read strict DER (BIP66) of at most 72 bytes; null: another form. S in the upper half is found by `verify`. */
export function fromDer(der) {
  if (der.length < 8 || der.length > 72 || der[0] !== 0x30 || der[1] !== der.length - 2) return null;
  const compact = new Uint8Array(64);
  let at = 2;
  for (const end of [32, 64]) {
    const size = der[at + 1],
      bytes = der.slice(at + 2, at + 2 + size);
    if (der[at] !== 2 || !size || bytes.length !== size || bytes[0] >= 0x80) return null;
    if (size > 1 && bytes[0] === 0 && bytes[1] < 0x80) return null;
    const number = bytes[0] === 0 ? bytes.slice(1) : bytes;
    if (number.length > 32) return null;
    compact.set(number, end - number.length);
    at += 2 + size;
  }
  return at === der.length ? compact : null;
}

// --- members of JSON -------------------------------------------------------------------------------------------------

function satOf(text, field) {
  const number = typeof text === "string" && /^(?:0|[1-9][0-9]{0,15})$/.test(text) ? Number(text) : NaN;
  if (!(number <= MAX_MONEY_SAT)) throw malformed(field, `a decimal text of 0 to ${MAX_MONEY_SAT} sat`);
  return number;
}

function wholeOf(number, field, most) {
  if (!Number.isInteger(number) || number < 0 || number > most)
    throw malformed(field, `a whole number of 0 to ${most}`);
  return number;
}

const countOf = (number, field) => wholeOf(number, field, 0xffffffff);

function outpointOf(text, field) {
  const found = typeof text === "string" && /^[0-9a-f]{64}:(0|[1-9][0-9]{0,9})$/.exec(text);
  if (!found || Number(found[1]) > 0xffffffff) throw malformed(field, "a txid, a colon and an index of 32 bits");
  return text;
}

function textOf(text, field) {
  if (typeof text !== "string" || !text) throw malformed(field, "a text");
  return text;
}

const objectOf = (value) => (value !== null && typeof value === "object" && !Array.isArray(value) ? value : {});

/** Read a channel as the server has it. Raises `malformed_payment` if a member is wrong, or if the sums contradict. */
function stateOf(shown, proof, names) {
  const [capacitySat, acceptedSat, spentSat, creditSat] = [
    names.capacity,
    names.accepted,
    names.spent,
    names.credit,
  ].map((name) => satOf(shown[name], name));
  const changeSat = names.change in shown ? satOf(shown[names.change], names.change) : capacitySat - acceptedSat;
  const hasProof = proof !== undefined && proof !== null;
  if (hasProof && satOf(objectOf(proof).changeSat, "changeSat") !== changeSat)
    throw malformed("changeSat", "that of the state");
  if (acceptedSat + changeSat !== capacitySat || creditSat + spentSat < acceptedSat)
    throw malformed(names.accepted, "sums that do not contradict each other");
  countOf(shown.expiry, "expiry");
  return {
    channel: outpointOf(shown[names.channel], names.channel),
    capacitySat,
    acceptedSat,
    creditSat,
    proof: hasProof ? proof : null,
  };
}

const X402_NAMES = {
  channel: "channel",
  capacity: "capacitySat",
  accepted: "acceptedCumulativeSat",
  spent: "spentSat",
  credit: "creditSat",
  change: "changeSat",
};
const MPP_NAMES = {
  channel: "channelId",
  capacity: "deposit",
  accepted: "acceptedCumulative",
  spent: "spent",
  credit: "credit",
  change: "changeSat",
};

const x402State = (extra) =>
  extra.channelState == null ? null : stateOf(objectOf(extra.channelState), extra.voucherState, X402_NAMES);

/** Read the terms of an offer; `details` has the members that x402 and MPP have in common, by x402's names. */
function offerOf(amount, unit, chain, identity, details, state) {
  if (!UNITS.includes(unit)) throw malformed("unit", `one of ${UNITS.join(", ")}`);
  if (!Object.values(CHAINS).includes(chain)) throw malformed("chain", "a known network");
  const deposit = details.suggestedDepositSat;
  return {
    amountSat: satOf(amount, "amount"),
    unit,
    chain,
    identity: bytesToHex(keyOf(identity, "payTo")),
    payUrl: textOf(details.payUrl, "payUrl"),
    openPriceSat: satOf(details.openPriceSat, "openPriceSat"),
    minConfirmations: countOf(details.minConfirmations, "minConfirmations"),
    settlementPeriodSeconds: countOf(details.settlementPeriodSeconds, "settlementPeriodSeconds"),
    dustSat: satOf(details.dustLimitSat, "dustLimitSat"),
    suggestedDepositSat: deposit === undefined ? null : satOf(deposit, "suggestedDeposit"),
    state,
  };
}

/** Say whether an entry of `accepts` is of this binding. Other bindings have the same scheme and network. */
export function isOurs(way) {
  const extra = objectOf(way.extra);
  return way.scheme === SCHEME && extra.assetTransferMethod === TRANSFER_METHOD && extra.binding === BINDING;
}

/** CAIP-19 id of a chain's coin. */
export const assetOf = (chain) => `${chain}/slip44:${chain === CHAINS.mainnet ? 0 : 1}`;

/** Read an entry of `accepts`. @returns {Offer} Raises `payment_unsupported` for another binding. */
export function x402Offer(way) {
  if (!isOurs(way)) throw new PaychanError("payment_unsupported", `the offer is of another binding than ${BINDING}`);
  const extra = way.extra;
  if (way.asset !== assetOf(way.network)) throw malformed("asset", assetOf(way.network));
  return offerOf(way.amount, extra.unit ?? "request", way.network, way.payTo, extra, x402State(extra));
}

/** Read the offers of a 402 that this binding can pay; the others are left out. @returns {Offer[]} */
export function x402Offers(required) {
  if (!Array.isArray(required.accepts)) throw malformed("accepts", "an array");
  return required.accepts.flatMap((way) => {
    try {
      return [x402Offer(objectOf(way))];
    } catch (error) {
      if (error instanceof PaychanError) return [];
      throw error;
    }
  });
}

/** Read the success of a payment. @returns {{state: State, chargedSat: number}} */
export function x402Settled(response) {
  const extra = objectOf(response.extra),
    state = x402State(extra);
  if (response.success !== true || state === null) throw malformed("PAYMENT-RESPONSE", "a success with a channelState");
  return { state, chargedSat: satOf(extra.chargedAmount, "chargedAmount") };
}

/** Read a challenge of mppx. @returns {Offer} Raises `payment_unsupported` for another method or binding. */
export function mppOffer(challenge) {
  const request = challenge.request,
    details = objectOf(request.methodDetails);
  if (
    challenge.method !== "bitcoin" ||
    challenge.intent !== "session" ||
    request.currency !== "sat" ||
    details.binding !== BINDING
  )
    throw new PaychanError("payment_unsupported", `the challenge is of another method or binding than ${BINDING}`);
  const shown = details.sessionSnapshot;
  const state = shown == null ? null : stateOf(objectOf(shown), shown.highestVoucher, MPP_NAMES);
  const common = {
    ...details,
    openPriceSat: details.minDeposit,
    dustLimitSat: details.dustLimit,
    suggestedDepositSat: request.suggestedDeposit,
  };
  if (details.chain !== CHAINS[details.network]) throw malformed("network", "the word of the chain");
  return offerOf(request.amount, request.unitType, details.chain, request.recipient, common, state);
}

/** Read `Payment-Receipt`. @returns {{state: State, chargedSat: number, challengeId: string}} */
export function mppReceipt(header) {
  let shown;
  try {
    shown = objectOf(
      JSON.parse(
        new TextDecoder().decode(
          Uint8Array.from(atob(header.replace(/-/g, "+").replace(/_/g, "/")), (each) => each.charCodeAt(0)),
        ),
      ),
    );
  } catch {
    throw malformed("Payment-Receipt", "base64url of JSON");
  }
  if (shown.status !== "success" || shown.method !== "bitcoin" || shown.intent !== "session")
    throw malformed("status", "a success of bitcoin/session");
  if (!/^\d{4}-\d\d-\d\dT/.test(shown.timestamp) || Number.isNaN(Date.parse(shown.timestamp)))
    throw malformed("timestamp", "a time (RFC 3339)");
  const state = stateOf(shown, null, MPP_NAMES);
  return { state, chargedSat: satOf(shown.charged, "charged"), challengeId: textOf(shown.challengeId, "challengeId") };
}

// --- channel ---------------------------------------------------------------------------------------------------------

/** An open channel with its key. One program uses it at a time; requests over it wait for each other. */
export class Channel {
  #key;
  #script;
  #changeScript;
  #save;
  #turn = Promise.resolve();

  /**
   * @param {ChannelJSON} json  what `save` got last; `changeSat` is the newest change that was signed
   * @param {(json: ChannelJSON) => void | Promise<void>} save  makes the channel durable; a signature
   *   leaves only afterwards
   */
  constructor(json, save) {
    if (typeof save !== "function") throw new TypeError("save: want a function that stores the channel durably");
    this.#key = hexOf(json.privateKey, "privateKey", 32);
    this.#save = save;
    /** @type {string} */
    this.clientKey = bytesToHex(secp256k1.getPublicKey(this.#key, true));
    /** @type {Facts} */
    this.facts = Object.freeze({
      serverKey: bytesToHex(keyOf(json.serverKey, "serverKey")),
      expiry: countOf(json.expiry, "expiry"),
      outpoint: outpointOf(json.outpoint, "outpoint"),
      fundingSat: wholeOf(json.fundingSat, "fundingSat", MAX_MONEY_SAT),
      changeScript: textOf(json.changeScript, "changeScript"),
      dustSat: wholeOf(json.dustSat, "dustSat", MAX_MONEY_SAT),
      payUrl: textOf(json.payUrl, "payUrl"),
      network: textOf(json.network, "network"),
      settlementPeriodSeconds: countOf(json.settlementPeriodSeconds, "settlementPeriodSeconds"),
    });
    this.#changeScript = hexOf(json.changeScript, "changeScript", 1, 34);
    this.#script = redeemScript(hexToBytes(json.serverKey), hexToBytes(this.clientKey), json.expiry);
    const { fundingSat } = this.facts;
    /** Highest sum that was signed. */
    this.signedSat = fundingSat - wholeOf(json.changeSat, "changeSat", fundingSat);
    /** The mark: the sum that the server has, by its newest receipt or proof. */
    this.acceptedSat = wholeOf(json.acceptedSat ?? this.signedSat, "acceptedSat", this.signedSat);
    /** Part of it, and of sums before a withdrawal, that no request has used up. */
    this.creditSat = wholeOf(json.creditSat ?? 0, "creditSat", MAX_MONEY_SAT);
  }

  /** @returns {ChannelJSON} with the private key */
  toJSON() {
    const { signedSat, acceptedSat, creditSat } = this;
    return this.#json({ signedSat, acceptedSat, creditSat });
  }

  /** Say whether the channel pays the server of an offer at this time (Unix seconds). */
  pays(offer, now) {
    const { network, payUrl, expiry, settlementPeriodSeconds } = this.facts;
    return (
      addressNetwork(offer.chain) === network &&
      sameServer(offer.payUrl, payUrl) &&
      expiry - settlementPeriodSeconds > now + SPARE_SECONDS
    );
  }

  /**
   * Sign the payment that leaves `changeSat` to the client; RFC 6979 gives the same signature again.
   *
   * @returns {Proof}
   */
  sign(changeSat) {
    const compact = secp256k1.sign(this.#digest(changeSat), this.#key, { prehash: false, lowS: true });
    return { changeSat: String(changeSat), sighash: flagOf(changeSat), signature: bytesToHex(toDer(compact)) };
  }

  /** Say whether a payment is signed by the channel's own key. */
  hasSigned(proof) {
    try {
      const changeSat = satOf(proof.changeSat, "changeSat"),
        compact = fromDer(hexOf(proof.signature, "signature", 8, 72));
      return (
        compact !== null &&
        proof.sighash === flagOf(changeSat) &&
        secp256k1.verify(compact, this.#digest(changeSat), hexToBytes(this.clientKey), { prehash: false, lowS: true })
      );
    } catch (error) {
      if (error instanceof PaychanError) return false;
      throw error;
    }
  }

  /**
   * Wait until no other request uses the channel, and begin one of this price. It ends with its answer, or after the
   * lease.
   */
  async begin(priceSat, leaseSeconds = LEASE_SECONDS) {
    const before = this.#turn;
    let free;
    this.#turn = new Promise((resolve) => {
      free = resolve;
    });
    await before;
    return new Attempt(this, priceSat, free, leaseSeconds, (change) => this.#keep(change));
  }

  async #keep(change) {
    const { signedSat, acceptedSat, creditSat } = this;
    await this.#save(this.#json({ signedSat, acceptedSat, creditSat, ...change }));
    Object.assign(this, change);
  }

  #json({ signedSat, acceptedSat, creditSat }) {
    return {
      privateKey: bytesToHex(this.#key),
      ...this.facts,
      changeSat: this.facts.fundingSat - signedSat,
      acceptedSat,
      creditSat,
    };
  }

  #digest(changeSat) {
    return paymentDigest(this.#script, this.facts.outpoint, this.#changeScript, changeSat);
  }
}

const addressNetwork = (chain) => ({ [CHAINS.mainnet]: "live", [CHAINS.regtest]: "regtest" })[chain] ?? "test";
const flagOf = (changeSat) => (changeSat === 0 ? WITHOUT_CHANGE : WITH_CHANGE);

function sameServer(one, other) {
  const parts = [one, other].map((text) => {
    try {
      const { protocol, hostname, port, pathname } = new URL(text);
      const isLocal = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);
      return [protocol, isLocal ? "localhost" : hostname, port, pathname.replace(/\/+$/, "")].join(" ");
    } catch {
      return NaN;
    }
  });
  return parts[0] === parts[1];
}

/** One request. In all its tries together, the signed sum grows by at most the price. */
class Attempt {
  #keep;
  #free;
  #timer;
  #mostSat;
  #wasCorrected = false;

  constructor(channel, priceSat, free, leaseSeconds, keep) {
    this.channel = channel;
    this.priceSat = priceSat;
    this.hasEnded = false;
    this.cumulativeSat = 0;
    this.#keep = keep;
    this.#free = free;
    this.#mostSat = channel.signedSat + priceSat;
    this.#timer = setTimeout(() => this.end(), leaseSeconds * 1000);
    this.#timer.unref?.();
  }

  /**
   * Make the payment; the same again until the mark moves. Raises `insufficient_funds` or `would_leave_dust`.
   *
   * @param {boolean} isNamed  the request has a name of its own, so that credit can pay it with the same change value
   *   as an earlier one; without a name the server takes a repeated change value for a repeated request
   * @returns {Promise<Proof & {cumulativeSat: string}>}
   */
  async payment(isNamed) {
    const { acceptedSat, creditSat, facts } = this.channel;
    const cumulativeSat = acceptedSat + Math.max(0, this.priceSat - (isNamed ? creditSat : 0));
    const changeSat = facts.fundingSat - cumulativeSat;
    if (changeSat < 0) {
      const fields = { price_sat: this.priceSat, left_sat: facts.fundingSat - acceptedSat };
      throw new PaychanError(
        "insufficient_funds",
        `price ${fields.price_sat} sat, but the channel has ${fields.left_sat} sat left: open another`,
        fields,
      );
    }
    if (cumulativeSat > acceptedSat && changeSat > 0 && changeSat < facts.dustSat) {
      const fields = { change_sat: changeSat, dust_sat: facts.dustSat };
      throw new PaychanError(
        "would_leave_dust",
        `change ${changeSat} sat, need 0 or at least ${facts.dustSat} sat: open another channel`,
        fields,
      );
    }
    if (cumulativeSat > this.#mostSat)
      throw new PaychanError(
        "too_much",
        `sum ${cumulativeSat} sat, at most ${this.#mostSat} sat may be signed for this request`,
        {},
      );
    if (cumulativeSat > this.channel.signedSat) await this.#keep({ signedSat: cumulativeSat });
    this.cumulativeSat = cumulativeSat;
    return { ...this.channel.sign(changeSat), cumulativeSat: String(cumulativeSat) };
  }

  /** Move the mark by a receipt. A receipt of another channel or sum counts as one that took the price. */
  async paid(state) {
    const { channel, cumulativeSat } = this;
    if (cumulativeSat < channel.acceptedSat) return this.end();
    const isOwn = state !== null && this.#isAbout(state) && state.acceptedSat === cumulativeSat;
    const creditSat = isOwn
      ? state.creditSat
      : Math.max(0, channel.creditSat + cumulativeSat - channel.acceptedSat - this.priceSat);
    await this.#keep({ acceptedSat: cumulativeSat, creditSat });
    this.end();
  }

  /**
   * Adopt the state of a refusal once, and say whether to send a new payment. Without a proof the channel believes only
   * a sum that it remembers. Raises `false_proof` if the signature shown is not by the channel's key: the server lies.
   */
  async corrected(state) {
    const { channel, priceSat } = this;
    if (this.hasEnded || this.#wasCorrected || !this.#isAbout(state)) return false;
    if (state.proof === null) {
      if (state.acceptedSat > channel.signedSat) return false;
    } else if (!channel.hasSigned(state.proof)) {
      this.end();
      const fields = { channel: state.channel, change_sat: state.proof.changeSat };
      throw new PaychanError(
        "false_proof",
        `the server shows a payment of change ${fields.change_sat} sat that this channel did not sign: stop paying it`,
        fields,
      );
    }
    const { acceptedSat, creditSat } = state;
    // A proven sum that this request did not sign, and that was not known before, is by another copy of the channel.
    const isByAnotherCopy = state.proof !== null && acceptedSat !== this.cumulativeSat;
    const mostSat = isByAnotherCopy ? Math.max(this.#mostSat, acceptedSat + priceSat) : this.#mostSat;
    if (acceptedSat + Math.max(0, priceSat - creditSat) > mostSat) return false;
    this.#wasCorrected = true;
    this.#mostSat = mostSat;
    await this.#keep({ signedSat: Math.max(channel.signedSat, acceptedSat), acceptedSat, creditSat });
    return true;
  }

  /** Let the next request use the channel. Idempotent. */
  end() {
    this.hasEnded = true;
    clearTimeout(this.#timer);
    this.#free();
  }

  #isAbout(state) {
    const { outpoint, fundingSat } = this.channel.facts;
    return state.channel === outpoint && state.capacitySat === fundingSat;
  }
}

// --- plug-ins --------------------------------------------------------------------------------------------------------

/** Begin a request over the first channel that pays an offer. */
function beginFor(channels, offer, { maxSat, units = 1, leaseSeconds, now = () => Date.now() / 1000 }) {
  const priceSat = offer.amountSat * (offer.unit === "request" ? 1 : units);
  if (!(priceSat <= maxSat)) {
    const fields = { price_sat: priceSat, max_sat: maxSat };
    throw new PaychanError("price_too_high", `price ${priceSat} sat, the limit is ${maxSat} sat`, fields);
  }
  const paying = channels.filter((channel) => channel.pays(offer, now()));
  const channel =
    paying.find(({ facts, acceptedSat }) => facts.fundingSat - acceptedSat - priceSat >= facts.dustSat) ?? paying[0];
  if (channel === undefined)
    throw new PaychanError(
      "no_channel",
      `no channel pays ${offer.payUrl}: open one there for ${priceSat} sat or more`,
      { pay_url: offer.payUrl },
    );
  return channel.begin(priceSat, leaseSeconds);
}

/** Policy of x402 clients: drop offers of the scheme on Bitcoin that are of another binding. */
export const ownBinding = (_version, ways) =>
  ways.filter((way) => way.scheme !== SCHEME || !way.network.startsWith("bip122:") || isOurs(way));

/**
 * Plug-in for `@x402/fetch` and `@x402/core`.
 *
 * @param {Channel[]} channels
 * @param {{maxSat: number, units?: number, leaseSeconds?: number, now?: () => number}} options  `maxSat`: highest price
 *   of one request; `units`: units that are paid for before an answer that is priced by unit
 * @returns `config` for `x402Client.fromConfig`; `watch`, around the fetch that the SDK calls: it unlocks a channel
 *   whose request found no server, which the SDK does not tell
 */
export function x402(channels, options) {
  const attempts = new WeakMap(); // by the object of the chosen offer: the SDK passes the same one for a second try
  const open = new Set();

  async function createPaymentPayload(x402Version, way, context) {
    const offer = x402Offer(way);
    let attempt = attempts.get(way);
    if (attempt === undefined || attempt.hasEnded) {
      attempt = await beginFor(channels, offer, options);
      attempt.name = context?.extensions?.[IDENTIFIER] ? crypto.randomUUID() : null;
      attempts.set(way, attempt);
      open.add(attempt);
    }
    try {
      const isFromCredit = attempt.name !== null && attempt.channel.creditSat >= attempt.priceSat;
      const payment = await attempt.payment(attempt.name !== null);
      attempt.signature = payment.signature;
      const payload = { type: "payment", channel: attempt.channel.facts.outpoint, ...payment };
      return {
        x402Version,
        payload,
        ...(isFromCredit && { extensions: { [IDENTIFIER]: { info: { id: attempt.name } } } }),
      };
    } catch (error) {
      finish(attempt);
      throw error;
    }
  }

  function finish(attempt) {
    attempt.end();
    open.delete(attempt);
  }

  async function onPaymentResponse({ requirements, settleResponse, paymentRequired }) {
    const attempt = attempts.get(requirements);
    if (attempt === undefined) return undefined;
    let recovered = false;
    try {
      if (settleResponse?.success) await attempt.paid(orNull(() => x402Settled(settleResponse).state));
      else {
        const extra = settleResponse?.extra ?? paymentRequired?.accepts?.find(isOurs)?.extra;
        const state = orNull(() => x402State(objectOf(extra)));
        recovered = state !== null && (await attempt.corrected(state));
      }
    } finally {
      if (!recovered) {
        attempts.delete(requirements);
        finish(attempt);
      }
    }
    return recovered ? { recovered: true } : undefined;
  }

  const client = { scheme: SCHEME, createPaymentPayload, schemeHooks: { onPaymentResponse } };
  const allowedAssets = Object.values(CHAINS).map((chain) => ({
    network: chain,
    asset: assetOf(chain),
    maxAmountPerPayment: String(options.maxSat),
  }));
  const watch = (fetch) => async (input, init) => {
    try {
      return await fetch(input, init);
    } catch (error) {
      const sent = (input instanceof Request ? input.headers : new Headers(init?.headers)).get("PAYMENT-SIGNATURE");
      if (sent !== null) for (const each of open) if (atob(sent).includes(each.signature)) finish(each);
      throw error;
    }
  };
  return {
    config: { schemes: [{ network: "bip122:*", client }], policies: [ownBinding], spendControls: { allowedAssets } },
    watch,
  };
}

function orNull(read) {
  try {
    return read();
  } catch (error) {
    if (error instanceof PaychanError) return null;
    throw error;
  }
}

/**
 * Plug-in for `mppx`.
 *
 * @param {Channel[]} channels
 * @param {{maxSat: number, units?: number, leaseSeconds?: number, now?: () => number}} options  as for `x402`
 * @returns `method` for `Mppx.create`; `around`, which wraps the fetch that `Mppx.create` returns: it knows a request's
 *   further tries as the same request, and reads its receipt
 */
export function mpp(channels, options) {
  const around =
    (fetch) =>
    async (input, init = {}) => {
      const request = { attempt: null, isNamed: false };
      const headers = new Headers(init.headers ?? (input instanceof Request ? input.headers : undefined));
      if (headers.has("Idempotency-Key")) request.isNamed = true;
      else if (channels.some((channel) => channel.creditSat > 0)) {
        headers.set("Idempotency-Key", `"${crypto.randomUUID()}"`);
        request.isNamed = true;
      }
      try {
        const response = await fetch(input, { ...init, headers, context: { ...init.context, paychan: request } });
        const receipt = response.headers.get("Payment-Receipt");
        if (request.attempt !== null && receipt !== null)
          await request.attempt.paid(orNull(() => mppReceipt(receipt).state));
        return response;
      } finally {
        request.attempt?.end();
      }
    };

  async function createCredential({ challenge, context }) {
    const request = context?.paychan;
    if (!request) throw new PaychanError("not_wrapped", "wrap the fetch of Mppx.create with around() of mpp()");
    const offer = mppOffer(challenge);
    if (request.attempt === null) request.attempt = await beginFor(channels, offer, options);
    else if (offer.state !== null) await request.attempt.corrected(offer.state);
    const attempt = request.attempt;
    const { cumulativeSat, ...payment } = await attempt.payment(request.isNamed);
    const payload = {
      action: "voucher",
      channelId: attempt.channel.facts.outpoint,
      cumulativeAmount: cumulativeSat,
      ...payment,
    };
    const wire = { challenge: { ...challenge, request: toBase64url(canonical(challenge.request)) }, payload };
    return `Payment ${toBase64url(JSON.stringify(wire))}`;
  }

  const canHandleChallenge = ({ challenge }) => orNull(() => mppOffer(challenge)) !== null;
  const method = {
    name: "bitcoin",
    intent: "session",
    canHandleChallenge,
    context: { parse: (value) => value },
    createCredential,
  };
  return { method, around };
}

/** Canonical JSON (RFC 8785): sorted keys, no spaces. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.keys(value)
    .sort()
    .map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`)
    .join(",")}}`;
}

function toBase64url(text) {
  const binary = Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
  return btoa(binary).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}
