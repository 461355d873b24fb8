// Sign-up and login. Must never keep a password longer than the request that carries it.

import { isInitialized, logIn, signUp } from './api.js';
import { h, show } from './dom.js';
import { field, form, page } from './parts.js';

const NAME = { autocomplete: 'username', required: true, maxlength: 64, autocapitalize: 'none', spellcheck: 'false' };

function frame(root, ...children) {
  show(root, h('div', { class: 'login', 'data-key': 'login' }, children));
  root.querySelector('input')?.focus();
}

function login(root, done, { name = '', note } = {}) {
  const send = async ({ username, password }) => {
    await logIn(username, password);
    await done();
  };
  const fields = [
    note && h('p', { class: 'quiet' }, note),
    field('User', 'username', { ...NAME, value: name }),
    field('Password', 'password', { type: 'password', autocomplete: 'current-password', required: true }),
  ];
  frame(root, page('Log in', null, form('Log in', send, fields)));
}

// A host that waited for a pool becomes PRIMARY first, and shows a certificate of the pool's own authority then.
async function logInSoon(username, password) {
  for (let tries = 0; ; tries += 1) {
    try {
      await logIn(username, password);
      return;
    } catch (error) {
      if (error.status !== 0 && error.status !== 503) throw error;
      if (tries === 20) throw new Error('You are signed up. Load this page again: the Console has another certificate now.');
    }
    await new Promise((resolve) => { setTimeout(resolve, 500); });
  }
}

function firstRun(root, done) {
  const send = async ({ username, password, again }) => {
    if (password !== again) throw new Error('The two passwords differ.');
    await signUp(username, password);
    await logInSoon(username, password);
    await done();
  };
  const fields = [
    field('User', 'username', { ...NAME, value: 'admin' }),
    field('Password', 'password', {
      type: 'password', autocomplete: 'new-password', required: true, hint: 'At least 12 characters. Nobody can read it back.',
    }),
    field('Password again', 'again', { type: 'password', autocomplete: 'new-password', required: true }),
  ];
  const intro = 'This Console has no user yet. Create its first Administrator.';
  frame(root, page('Sign up', intro, form('Create and log in', send, fields)));
}

// Shows the sign-up or the login, and calls `done` once somebody is logged in.
export async function open(root, done, note) {
  if (window.location.protocol !== 'https:') {
    const text = 'Passwords and sessions are only for HTTPS. Open this page at the HTTPS port (MANAGEMENT_PORT_HTTPS).';
    frame(root, page('This page needs HTTPS', text));
    return;
  }
  if (await isInitialized()) login(root, done, { note });
  else firstRun(root, done);
}
